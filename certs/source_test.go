package certs

import (
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"culvert/internal/testpki"
)

const aliceName = "alice.server.dc1.consul"

// pair is a server and a client of one CA, each with its folder, and a clock for both.
type pair struct {
	ca                   *testpki.CA
	server, client       *Source
	serverDir, clientDir string
	clock                atomic.Int64 // how far ahead of when the test began, in nanoseconds
	serverConfig         *tls.Config
}

func newPair(t *testing.T, ca *testpki.CA) *pair {
	t.Helper()
	p := &pair{ca: ca}
	p.server, p.serverDir = load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	p.client, p.clientDir = load(t, ca, ca.Leaf(t, testpki.Server("dc2", "bob")))
	start := time.Now()
	now := func() time.Time { return start.Add(time.Duration(p.clock.Load())) }
	p.server.opts.Now, p.client.opts.Now = now, now
	p.serverConfig = p.server.ServerConfig([]string{"p"}, only(RoleServer))
	return p
}

func (p *pair) connect() (server, client end) {
	return handshake(p.serverConfig, p.client.ClientConfig(aliceName, []string{"p"}))
}

// resume connects twice, so that the next connection has a ticket to resume with.
func (p *pair) resume(t *testing.T) {
	t.Helper()
	for i := range 2 {
		server, client := p.connect()
		if server.err != nil || client.err != nil {
			t.Fatalf("connection %d: %v, %v", i, server.err, client.err)
		}
		if resumed := i > 0; server.state.DidResume != resumed || client.state.DidResume != resumed {
			t.Fatalf("connection %d: resumed %t, %t", i, server.state.DidResume, client.state.DidResume)
		}
		if id, err := p.server.PeerIdentity(server.state); err != nil || id.String() != "dc2/bob" {
			t.Fatalf("connection %d: the server sees %v, %v", i, id, err)
		}
	}
}

func TestResumedSessionIsVerifiedAgain(t *testing.T) {
	// The CA ends before its certificates: crypto/tls looks at those alone when it resumes.
	end := time.Now().Add(24 * time.Hour)
	p := newPair(t, testpki.New(t, "consul", testpki.NotAfter(end)))
	p.resume(t)
	p.clock.Store(int64(25 * time.Hour))
	server, client := p.connect()
	if !client.state.DidResume {
		t.Fatal("the session was not resumed: this test shows nothing")
	}
	if server.err == nil {
		t.Error("the server went on")
	}
	checkRefusal(t, client.err, PeerError{
		ReasonExpired, "valid at " + timestamp(p.client.opts.Now()),
		`CA "CN=Test CA consul" expired ` + timestamp(end) + ", names alice.server.dc1.consul, server.dc1.consul, localhost",
	})
}

// Here the client would go on: the server alone has to refuse what it resumes.
func TestResumedClientIsVerifiedAgain(t *testing.T) {
	end := time.Now().Add(24 * time.Hour)
	p := newPair(t, testpki.New(t, "consul", testpki.NotAfter(end)))
	lenient := p.client.ClientConfig(aliceName, []string{"p"})
	lenient.VerifyConnection = nil
	if server, _ := handshake(p.serverConfig, lenient); server.err != nil {
		t.Fatal(server.err)
	}
	p.clock.Store(int64(25 * time.Hour))
	server, client := handshake(p.serverConfig, lenient)
	if !server.state.DidResume {
		t.Fatal("the session was not resumed: this test shows nothing")
	}
	checkRefusal(t, server.err, PeerError{
		ReasonExpired, "valid at " + timestamp(p.server.opts.Now()),
		`CA "CN=Test CA consul" expired ` + timestamp(end) + ", " + bobNames,
	})
	if client.err == nil {
		t.Error("the client got a byte")
	}
}

// reload takes new certificates into use, where they are good.
func reload(s *Source) error {
	use, err := s.Reload()
	if err == nil {
		use()
	}
	return err
}

// What was read is used when it is asked for and not before.
func TestReloadWaits(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	before := p.server.NotAfter()
	p.ca.WriteFiles(t, p.serverDir, p.ca.Leaf(t, testpki.Server("dc1", "alice"), testpki.NotAfter(before.Add(-time.Hour))))
	use, err := p.server.Reload()
	if err != nil || !p.server.NotAfter().Equal(before) {
		t.Fatalf("after the reading: until %v, %v", p.server.NotAfter(), err)
	}
	use()
	if got := p.server.NotAfter(); !got.Equal(before.Add(-time.Hour)) {
		t.Errorf("in use until %v", got)
	}
}

func TestReloadOfTheServersCA(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	p.resume(t)
	next := testpki.New(t, "consul")
	next.WriteFiles(t, p.serverDir, next.Leaf(t, testpki.Server("dc1", "alice")))
	if err := reload(p.server); err != nil {
		t.Fatal(err)
	}
	lenient := p.client.ClientConfig(aliceName, []string{"p"}) // with the ticket
	lenient.VerifyConnection = nil
	server, _ := handshake(p.serverConfig, lenient)
	if server.state.DidResume {
		t.Error("a ticket from before the CA was changed is good still")
	}
	checkRefusal(t, server.err, PeerError{ReasonOtherCA, issuedBy(next), issuedBy(p.ca) + ", " + bobNames})
}

func TestReloadOfTheClientsCA(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	p.resume(t)
	next := testpki.New(t, "consul")
	next.WriteFiles(t, p.clientDir, next.Leaf(t, bob()))
	if err := reload(p.client); err != nil {
		t.Fatal(err)
	}
	_, client := p.connect()
	if client.state.DidResume {
		t.Error("a session from before the CA was changed is resumed")
	}
	checkRefusal(t, client.err, PeerError{
		ReasonOtherCA, issuedBy(next), issuedBy(p.ca) + ", names alice.server.dc1.consul, server.dc1.consul, localhost",
	})
}

// A new certificate of the same CA is shown on the next connection, not the one in the ticket.
func TestReloadOfTheLeaf(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	p.resume(t)
	leaf := p.ca.Leaf(t, bob())
	p.ca.WriteFiles(t, p.clientDir, leaf)
	if err := reload(p.client); err != nil {
		t.Fatal(err)
	}
	server, client := p.connect()
	if server.err != nil || client.err != nil {
		t.Fatal(server.err, client.err)
	}
	if !server.state.PeerCertificates[0].Equal(leaf.Leaf) {
		t.Error("the server saw the old certificate")
	}
}

// A ticket for one set of roles is worth nothing to another.
func TestTicketIsOfOneConfiguration(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	gateway, _ := load(t, p.ca, p.ca.Leaf(t, testpki.Gateway("dc1", "gw1")))
	client := gateway.ClientConfig(aliceName, []string{"p"})
	if server, _ := handshake(p.server.ServerConfig([]string{"p"}, only(RoleGateway)), client); server.err != nil {
		t.Fatal(server.err)
	}
	server, _ := handshake(p.serverConfig, client)
	if server.state.DidResume {
		t.Error("resumed")
	}
	checkRefusal(t, server.err, PeerError{
		ReasonRole, "role server", "role gateway, names gw1.gateway.dc1.consul, gateway.dc1.consul, localhost",
	})
}

func TestFailedReloadKeepsTheOld(t *testing.T) {
	ca := testpki.New(t, "consul")
	dir := t.TempDir()
	good := ca.Leaf(t, testpki.Server("dc1", "alice"))
	ca.WriteFiles(t, dir, good)
	o := optionsFor(dir)
	reg := prometheus.NewRegistry()
	o.Metrics = NewMetrics(reg)
	src, err := Load(o)
	if err != nil {
		t.Fatal(err)
	}
	spoil := map[string]func(){
		"there is no PEM certificate in it": func() { write(t, o.CertFile, "garbage") },
		"is not the key of":                 func() { write(t, o.KeyFile, string(ca.Leaf(t).KeyPEM)) },
		"does not exist":                    func() { _ = os.Remove(o.CAFile) },
		"does not lead to":                  func() { write(t, o.CAFile, string(testpki.New(t, "consul").PEM)) },
		"is of server dc1/amy, but server dc1/alice runs": func() {
			ca.WriteFiles(t, dir, ca.Leaf(t, testpki.Server("dc1", "amy")))
		},
	}
	for want, f := range spoil {
		ca.WriteFiles(t, dir, good)
		f()
		if err := reload(src); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Reload: %v; want %q", err, want)
		}
		if src.Identity().String() != "dc1/alice" || !src.NotAfter().Equal(good.Leaf.NotAfter) {
			t.Errorf("after %q: %v until %v", want, src.Identity(), src.NotAfter())
		}
	}
	later := ca.Leaf(t, testpki.Server("dc1", "alice"), testpki.NotAfter(time.Now().Add(7*24*time.Hour)))
	short := testpki.New(t, "consul", testpki.NotAfter(time.Now().Add(-time.Hour)))
	ca.WriteFiles(t, dir, later)
	write(t, o.CAFile, string(ca.PEM)+string(short.PEM)) // the old CA has ended, and that is no fault
	if err := reload(src); err != nil {
		t.Fatal(err)
	}
	if err := src.Valid(time.Now()); err != nil {
		t.Error(err)
	}
	if err := src.Valid(later.Leaf.NotAfter.Add(time.Second)); err == nil {
		t.Error("valid after its end")
	}
	want := fmt.Sprintf(`
# HELP culvert_certs_not_after_seconds When the certificate in use expires, in seconds since 1970; ca is the one of the bundle that expires first.
# TYPE culvert_certs_not_after_seconds gauge
culvert_certs_not_after_seconds{certificate="ca"} %d
culvert_certs_not_after_seconds{certificate="leaf"} %d
# HELP culvert_certs_reloads_total Attempts to read the certificates again. After a failed one the old ones stay in use.
# TYPE culvert_certs_reloads_total counter
culvert_certs_reloads_total{result="failed"} 5
culvert_certs_reloads_total{result="ok"} 1
`, short.Cert.NotAfter.Unix(), later.Leaf.NotAfter.Unix())
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// While a CA is replaced, with both in every bundle, no connection fails.
func TestConcurrentRotation(t *testing.T) {
	p := newPair(t, testpki.New(t, "consul"))
	next := testpki.New(t, "consul")
	both := string(p.ca.PEM) + string(next.PEM)
	rotate := func(s *Source, dir string, ca *testpki.CA, who testpki.Option) {
		ca.WriteFiles(t, dir, ca.Leaf(t, who))
		write(t, filepath.Join(dir, "ca.pem"), both)
		if err := reload(s); err != nil {
			t.Error(err)
		}
	}
	rotate(p.server, p.serverDir, p.ca, testpki.Server("dc1", "alice"))
	rotate(p.client, p.clientDir, p.ca, bob())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if server, client := p.connect(); server.err != nil || client.err != nil {
					t.Error(server.err, client.err)
					return
				}
			}
		})
	}
	for range 10 {
		for _, ca := range []*testpki.CA{next, p.ca} {
			rotate(p.server, p.serverDir, ca, testpki.Server("dc1", "alice"))
			rotate(p.client, p.clientDir, ca, bob())
		}
	}
	close(stop)
	wg.Wait()
}

func TestKeyIsRedacted(t *testing.T) {
	ca := testpki.New(t, "consul")
	leaf := ca.Leaf(t, testpki.Server("dc1", "alice"))
	src, _ := load(t, ca, leaf)
	private, ok := leaf.TLS.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("a key of type %T", leaf.TLS.PrivateKey)
	}
	secret, err := private.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	bytes := strings.Trim(fmt.Sprintf("%d", secret), "[]")
	decimal := new(big.Int).SetBytes(secret).String()
	config, err := src.ServerConfig(nil, only(RoleServer)).GetConfigForClient(nil)
	if err != nil {
		t.Fatal(err)
	}
	key := config.Certificates[0].PrivateKey
	type holder struct {
		Public  any
		private any
	}
	values := []any{key, &key, holder{key, key}, []any{key}, config.Certificates[0], src, *src.current.Load()}
	var printed []string
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			printed = append(printed, fmt.Sprintf(verb, v))
		}
	}
	marshalled, err := json.Marshal(map[string]any{"key": key, "in": holder{Public: key}})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"in":{"Public":"[redacted]"},"key":"[redacted]"}`; string(marshalled) != want {
		t.Errorf("JSON %s; want %s", marshalled, want)
	}
	encoder := zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig())
	line, err := encoder.EncodeEntry(zapcore.Entry{}, []zapcore.Field{zap.Any("key", key), zap.Reflect("r", config.Certificates)})
	if err != nil {
		t.Fatal(err)
	}
	printed = append(printed, line.String())
	for _, s := range printed {
		if strings.Contains(s, decimal) || strings.Contains(strings.ToLower(s), fmt.Sprintf("%x", secret)) ||
			strings.Contains(s, bytes) {
			t.Errorf("the key is in %.300s", s)
		}
	}
	if got := fmt.Sprint(key); got != "[redacted]" {
		t.Errorf("printed as %q", got)
	}
	if s, ok := key.(fmt.Stringer); !ok || s.String() != "[redacted]" {
		t.Errorf("String() = %v", s)
	}
}
