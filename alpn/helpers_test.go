package alpn

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"culvert/certs"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// load makes the credentials of a certificate, through the files that a real
// process reads.
func load(t testing.TB, ca *testpki.CA, cert *testpki.Cert) *certs.Source {
	t.Helper()
	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), cert)
	s, err := certs.Load(certs.Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// acceptor is a Server with what a test wants to know of it.
type acceptor struct {
	*Server
	metrics *Metrics
	conns   chan *Conn // every connection that a handler got
	log     *observer.ObservedLogs

	mu      sync.Mutex
	refused []string
}

func newAcceptor(t testing.TB, table *Table, creds Credentials) *acceptor {
	t.Helper()
	core, log := observer.New(zapcore.DebugLevel)
	a := &acceptor{conns: make(chan *Conn, 16), log: log, metrics: NewMetrics(prometheus.NewRegistry())}
	h := HandlerFunc(func(_ context.Context, c *Conn) { a.conns <- c })
	s, err := NewServer(table, creds, ServerOptions{
		Packet: h, Stream: h, Session: h, Raft: h, HTTP: h, Metrics: a.metrics, Log: zap.New(core),
		Refused: func(reason string) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.refused = append(a.refused, reason)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	a.Server = s
	return a
}

// reasons are those counted so far; each must be one of [Reasons].
func (a *acceptor) reasons(t testing.TB) []string {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.refused {
		if !slices.Contains(Reasons(), r) {
			t.Errorf("reason %q is not in the closed set", r)
		}
	}
	return slices.Clone(a.refused)
}

func (a *acceptor) wantRefused(t testing.TB, want ...string) {
	t.Helper()
	if got := a.reasons(t); !slices.Equal(got, want) {
		t.Errorf("refused for %q, want %q", got, want)
	}
}

// serve runs ServeConn on c until the test ends.
func (a *acceptor) serve(t testing.TB, c net.Conn) (done <-chan struct{}) {
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		a.ServeConn(t.Context(), sniff.NewConn(c, nil), func(bool) bool { return true })
	}()
	t.Cleanup(func() { c.Close(); <-ch })
	return ch
}

// site is two servers of one CA: alice accepts, bob dials.
type site struct {
	ca     *testpki.CA
	table  *Table
	accept *acceptor
	dialer *Dialer
	dialed *Metrics
}

func newSite(t testing.TB) *site {
	t.Helper()
	ca := testpki.New(t, "consul")
	table := mustTable(t, services())
	s := &site{ca: ca, table: table, dialed: NewMetrics(prometheus.NewRegistry())}
	s.accept = newAcceptor(t, table, load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice"))))
	s.dialer = NewDialer(table, load(t, ca, ca.Leaf(t, testpki.Server("dc2", "bob"))), DialerOptions{Metrics: s.dialed})
	return s
}

const aliceName = "alice.server.dc1.consul"

// connect makes a connection between the two over the given ends.
func (s *site) connect(t testing.TB, client, server net.Conn, service string) (dialed, accepted *Conn) {
	t.Helper()
	s.accept.serve(t, server)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	dialed, err := s.dialer.Dial(ctx, client, aliceName, service)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialed.Abort() })
	select {
	case accepted = <-s.accept.conns:
	case <-ctx.Done():
		t.Fatal("no handler was given the connection")
	}
	t.Cleanup(func() { accepted.Abort() })
	return dialed, accepted
}

func (s *site) connectTCP(t testing.TB, service string) (dialed, accepted *Conn) {
	t.Helper()
	client, server := testtcp.Pair(t)
	return s.connect(t, client, server, service)
}

func count(c prometheus.Collector) int { return int(testutil.ToFloat64(c)) }

// plainClient is a TLS client that offers what it is told to.
func plainClient(c net.Conn, creds Credentials, protos ...string) *tls.Conn {
	return tls.Client(c, creds.ClientConfig(aliceName, protos))
}
