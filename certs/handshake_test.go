package certs

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// load makes a Source of a certificate, from files in a folder of its own.
func load(t *testing.T, ca *testpki.CA, cert *testpki.Cert) (*Source, string) {
	t.Helper()
	dir := t.TempDir()
	ca.WriteFiles(t, dir, cert)
	s, err := Load(optionsFor(dir))
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func optionsFor(dir string) Options {
	return Options{
		CAFile: filepath.Join(dir, "ca.pem"), CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"),
		Domain: "consul",
	}
}

// rawClient is a client that verifies nothing and shows what it is given, asked for or not.
func rawClient(cert *testpki.Cert) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, ServerName: "alice.server.dc1.consul", NextProtos: []string{"p"}}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert.TLS, nil }
	}
	return c
}

// only admits these roles, whatever the protocol.
func only(roles ...Role) func(string) (Admission, error) {
	return func(string) (Admission, error) { return Admission{Roles: roles}, nil }
}

func rawServer(cert *testpki.Cert) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert.TLS}, NextProtos: []string{"p"}}
}

// buffered is one direction of an in-memory connection: with net.Pipe, whose
// writes wait for reads, an alert and a flight would wait for each other.
type buffered struct {
	net.Conn // unused, for the methods that TLS does not need here
	in, out  chan []byte
	rest     []byte
	once     sync.Once
}

func newConns() (net.Conn, net.Conn) {
	a, b := make(chan []byte, 64), make(chan []byte, 64)
	return &buffered{in: a, out: b}, &buffered{in: b, out: a}
}

func (c *buffered) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		select {
		case b, ok := <-c.in:
			if !ok {
				return 0, io.EOF
			}
			c.rest = b
		case <-time.After(10 * time.Second):
			return 0, os.ErrDeadlineExceeded
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *buffered) Write(p []byte) (int, error) {
	c.out <- append([]byte(nil), p...)
	return len(p), nil
}
func (c *buffered) Close() error { c.once.Do(func() { close(c.out) }); return nil }

func (c *buffered) SetDeadline(time.Time) error      { return nil }
func (c *buffered) SetWriteDeadline(time.Time) error { return nil }

// An end is what one side of a handshake came to. The client reads a byte after
// it, and so gets the session ticket, or the alert that refuses it.
type end struct {
	state tls.ConnectionState
	err   error
}

func handshake(server, client *tls.Config) (s, c end) {
	a, b := newConns()
	var wg sync.WaitGroup
	wg.Go(func() {
		conn := tls.Server(a, server)
		s.err = conn.Handshake()
		s.state = conn.ConnectionState()
		if s.err == nil {
			_, s.err = conn.Write([]byte("x"))
		}
		_ = conn.Close()
	})
	conn := tls.Client(b, client)
	c.err = conn.Handshake()
	c.state = conn.ConnectionState()
	if c.err == nil {
		_, c.err = io.ReadFull(conn, make([]byte, 1))
	}
	_ = conn.Close()
	wg.Wait()
	return s, c
}

// checkRefusal compares reason, wanted and found, as text.
func checkRefusal(t *testing.T, err error, want PeerError) {
	t.Helper()
	got, ok := errors.AsType[*PeerError](err)
	if !ok {
		t.Fatalf("got %v; want reason %s", err, want.Reason)
	}
	if *got != want {
		t.Errorf("got  %+v\nwant %+v", *got, want)
	}
	if text := fmt.Sprintf("certificate refused (%s): wanted %s; found %s", want.Reason, want.Wanted, want.Found); got.Error() != text {
		t.Errorf("Error() = %q", got.Error())
	}
}

func issuedBy(ca *testpki.CA) string {
	return fmt.Sprintf("issued by %q (%s)", ca.Cert.Subject, keyID(ca.Cert.SubjectKeyId))
}

const (
	bobNames   = "names bob.server.dc2.consul, server.dc2.consul, localhost"
	nameWanted = "a name like <node>.server.<dc>.consul"
	oneWanted  = "the names of one node, in one datacenter and one role"
)

func bob() testpki.Option { return testpki.Server("dc2", "bob") }

// critical adds an extension that nobody knows and that must be understood.
func critical(_ string, template *x509.Certificate) {
	template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{
		Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0},
	})
}

func TestInboundRefusals(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	past, future := now.Add(-2*time.Hour), now.Add(2*time.Hour)
	at := "valid at " + timestamp(now)
	ca, other := testpki.New(t, "consul"), testpki.New(t, "consul")
	oldCA := testpki.New(t, "consul", testpki.NotAfter(past))

	src, dir := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	src.opts.Now = func() time.Time { return now }
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), append(ca.PEM, oldCA.PEM...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := reload(src); err != nil {
		t.Fatal(err)
	}
	bundle := issuedBy(ca) + strings.Replace(issuedBy(oldCA), "issued by", " or", 1)

	cases := []struct {
		name string
		cert *testpki.Cert
		want PeerError
	}{
		{"other CA", other.Leaf(t, bob()), PeerError{ReasonOtherCA, bundle, issuedBy(other) + ", " + bobNames}},
		{"other CA and expired", other.Leaf(t, bob(), testpki.NotAfter(past)), PeerError{ReasonOtherCA, bundle, issuedBy(other) + ", " + bobNames}},
		{"expired", ca.Leaf(t, bob(), testpki.NotAfter(past)), PeerError{ReasonExpired, at, "expired " + timestamp(past) + ", " + bobNames}},
		{"CA expired", oldCA.Leaf(t, bob()), PeerError{ReasonExpired, at, `CA "CN=Test CA consul" expired ` + timestamp(past) + ", " + bobNames}},
		{"not yet valid", ca.Leaf(t, bob(), testpki.NotBefore(future)), PeerError{ReasonNotYetValid, at, "not valid before " + timestamp(future) + ", " + bobNames}},
		{
			"no client use", ca.Leaf(t, bob(), testpki.Usages(x509.ExtKeyUsageServerAuth)),
			PeerError{ReasonKeyUsage, "extended key usage clientAuth", "extended key usage serverAuth, " + bobNames},
		},
		{
			"other domain", ca.Leaf(t, testpki.Names("bob.server.dc2.nomad")),
			PeerError{ReasonOtherDomain, nameWanted, "names bob.server.dc2.nomad"},
		},
		{"no names", ca.Leaf(t), PeerError{ReasonNoNames, nameWanted, "no names"}},
		{"no names of ours", ca.Leaf(t, testpki.Names("localhost", "web.example.org")), PeerError{ReasonNoNames, nameWanted, "names localhost, web.example.org"}},
		{
			"client role", ca.Leaf(t, testpki.Client("dc1")),
			PeerError{ReasonRole, "role server", "role client, names client.dc1.consul, localhost"},
		},
		{
			"gateway role", ca.Leaf(t, testpki.Gateway("dc1", "gw1")),
			PeerError{ReasonRole, "role server", "role gateway, names gw1.gateway.dc1.consul, gateway.dc1.consul, localhost"},
		},
		{
			"two roles", ca.Leaf(t, testpki.Names("server.dc2.consul", "gateway.dc2.consul")),
			PeerError{ReasonConflictingNames, oneWanted, "names server.dc2.consul, gateway.dc2.consul"},
		},
		{
			"two datacenters", ca.Leaf(t, bob(), testpki.Names("server.dc1.consul")),
			PeerError{ReasonConflictingNames, oneWanted, bobNames + ", server.dc1.consul"},
		},
		{
			"two nodes", ca.Leaf(t, bob(), testpki.Names("amy.server.dc2.consul")),
			PeerError{ReasonConflictingNames, oneWanted, bobNames + ", amy.server.dc2.consul"},
		},
		{"none", nil, PeerError{ReasonNoCertificate, "a certificate " + bundle, "no certificate"}},
		{
			"critical extension", ca.Leaf(t, bob(), critical),
			PeerError{ReasonBadCertificate, "a certificate that can be verified", `"x509: unhandled critical extension", ` + bobNames},
		},
	}
	seen := map[string]bool{
		ReasonNameMismatch: true, // outbound alone
		ReasonDatacenter:   true, // TestAdmissionByProtocol
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			server, client := handshake(src.ServerConfig([]string{"p"}, only(RoleServer)), rawClient(c.cert))
			checkRefusal(t, server.err, c.want)
			if client.err == nil {
				t.Error("the client got a byte")
			}
		})
		seen[c.want.Reason] = true
	}
	for _, reason := range Reasons() {
		if !seen[reason] {
			t.Errorf("no case for reason %s", reason)
		}
	}
}

func TestInboundAdmits(t *testing.T) {
	ca := testpki.New(t, "consul")
	src, _ := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	cases := []struct {
		names string
		want  Identity
	}{
		{"server.dc2.consul bob.server.dc2.consul localhost", Identity{"dc2", "bob", RoleServer}},
		{"*.server.dc2.consul", Identity{"dc2", "", RoleServer}},
		{"server.dc2.consul", Identity{"dc2", "", RoleServer}},
		{"gw1.gateway.dc2.consul gateway.dc2.consul", Identity{"dc2", "gw1", RoleGateway}},
	}
	config := src.ServerConfig([]string{"p"}, only(RoleServer, RoleGateway))
	for _, c := range cases {
		server, client := handshake(config, rawClient(ca.Leaf(t, testpki.Names(strings.Fields(c.names)...))))
		if server.err != nil || client.err != nil {
			t.Errorf("%s: %v, %v", c.names, server.err, client.err)
			continue
		}
		if id, err := src.PeerIdentity(server.state); err != nil || id != c.want {
			t.Errorf("%s: identity %+v, %v; want %+v", c.names, id, err, c.want)
		}
		if server.state.Version != tls.VersionTLS13 || server.state.NegotiatedProtocol != "p" {
			t.Errorf("%s: version %x, protocol %q", c.names, server.state.Version, server.state.NegotiatedProtocol)
		}
	}
	// With no roles nobody is admitted.
	server, _ := handshake(src.ServerConfig(nil, only()), rawClient(ca.Leaf(t, bob())))
	checkRefusal(t, server.err, PeerError{ReasonRole, "no role", "role server, " + bobNames})

	old := rawClient(ca.Leaf(t, bob()))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if server, _ := handshake(config, old); server.err == nil {
		t.Error("TLS 1.2 was taken")
	}
	if _, err := src.PeerIdentity(tls.ConnectionState{}); err == nil {
		t.Error("a connection without a certificate has an identity")
	}
}

// The request for a certificate names no CAs, and no client of ours would mind if it did.
func TestCertificateOfAnotherCAIsShown(t *testing.T) {
	ours, theirs := testpki.New(t, "consul"), testpki.New(t, "nomad")
	src, _ := load(t, ours, ours.Leaf(t, testpki.Server("dc1", "alice")))
	client := rawClient(nil)
	stranger := theirs.Leaf(t, testpki.Server("dc1", "bob"))
	client.Certificates = []tls.Certificate{stranger.TLS} // withheld if the request names other CAs
	server, _ := handshake(src.ServerConfig(nil, only(RoleServer)), client)
	checkRefusal(t, server.err, PeerError{
		ReasonOtherCA, issuedBy(ours), issuedBy(theirs) + ", names bob.server.dc1.nomad, server.dc1.nomad, localhost",
	})

	picky := rawServer(stranger)
	picky.ClientAuth, picky.ClientCAs = tls.RequireAnyClientCert, theirs.Pool()
	config := src.ClientConfig("alice.server.dc1.consul", []string{"p"})
	config.VerifyConnection = nil // what the client thinks of the server is not the matter here
	if server, _ := handshake(picky, config); len(server.state.PeerCertificates) == 0 {
		t.Errorf("the server saw no certificate: %v", server.err)
	}
}

func TestOutbound(t *testing.T) {
	ca, other := testpki.New(t, "consul"), testpki.New(t, "consul")
	src, _ := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	now := time.Now().UTC().Truncate(time.Second)
	src.opts.Now = func() time.Time { return now }
	past := now.Add(-time.Minute)
	const dialled = "bob.server.dc2.consul"
	mismatch := func(wanted, found string) *PeerError {
		return &PeerError{ReasonNameMismatch, "name " + wanted, "names " + found}
	}
	cases := []struct {
		name    string
		dialled string
		cert    *testpki.Cert
		want    *PeerError
	}{
		{"node", dialled, ca.Leaf(t, bob()), nil},
		{"any server", "server.dc2.consul", ca.Leaf(t, bob()), nil},
		{"upper case", "Bob.Server.DC2.Consul", ca.Leaf(t, bob()), nil},
		{"wildcard", dialled, ca.Leaf(t, testpki.Names("*.server.dc2.consul")), nil},
		{"gateway", "gw1.gateway.dc2.consul", ca.Leaf(t, testpki.Gateway("dc2", "gw1")), nil},
		{"any gateway", "gateway.dc2.consul", ca.Leaf(t, testpki.Gateway("dc2", "gw1")), nil},

		{"without its node", dialled, ca.Leaf(t, testpki.Names("server.dc2.consul")), mismatch(dialled, "server.dc2.consul")},
		{"another node", dialled, ca.Leaf(t, testpki.Names("amy.server.dc2.consul")), mismatch(dialled, "amy.server.dc2.consul")},
		{"another datacenter", "server.dc3.consul", ca.Leaf(t, bob()), mismatch("server.dc3.consul", strings.TrimPrefix(bobNames, "names "))},
		{"localhost", "localhost", ca.Leaf(t, bob()), mismatch("localhost", strings.TrimPrefix(bobNames, "names "))},
		{"wildcard of two labels", "rack1." + dialled, ca.Leaf(t, testpki.Names("*.server.dc2.consul")), mismatch("rack1."+dialled, "*.server.dc2.consul")},
		{"wildcard for the role", "server.dc2.consul", ca.Leaf(t, testpki.Names("*.dc2.consul", "gateway.dc2.consul")), mismatch("server.dc2.consul", "*.dc2.consul, gateway.dc2.consul")},
		{"two nodes", dialled, ca.Leaf(t, bob(), testpki.Names("amy.server.dc2.consul")), &PeerError{ReasonConflictingNames, oneWanted, bobNames + ", amy.server.dc2.consul"}},
		{"other CA", dialled, other.Leaf(t, bob()), &PeerError{ReasonOtherCA, issuedBy(ca), issuedBy(other) + ", " + bobNames}},
		{"expired", dialled, ca.Leaf(t, bob(), testpki.NotAfter(past)), &PeerError{ReasonExpired, "valid at " + timestamp(now), "expired " + timestamp(past) + ", " + bobNames}},
		{"no server use", dialled, ca.Leaf(t, bob(), testpki.Usages(x509.ExtKeyUsageClientAuth)), &PeerError{ReasonKeyUsage, "extended key usage serverAuth", "extended key usage clientAuth, " + bobNames}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, client := handshake(rawServer(c.cert), src.ClientConfig(c.dialled, []string{"p"}))
			if c.want != nil {
				checkRefusal(t, client.err, *c.want)
			} else if client.err != nil {
				t.Error(client.err)
			}
		})
	}
}
