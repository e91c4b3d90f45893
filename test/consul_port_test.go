package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"culvert/internal/testpki"
	"culvert/test/lab"
)

// A sidecar may have the RPC port of a Consul server that demands TLS: native
// servers come to it by ALPN, and what is the server's own goes through.
func TestConsulsPort(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	n := lab.TwoSites(t, lab.Options{HostsA: 1})
	l := &lone{t: t, host: n.Sites[0].Hosts[0], others: n.Sites[0].Gateway, ca: testpki.New(t, "consul")}
	server, err := l.host.Listen("127.0.0.1:8300")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	ca, cert, key := l.ca.WriteFiles(t, t.TempDir(), l.ca.Leaf(t, testpki.Server("dc1", "alice")))
	l.sidecar = l.host.StartCulvert("sidecar", fmt.Sprintf(`datacenter = "dc1"
node = "alice"
server {
  profile   = "consul"
  address   = %q
  advertise = "127.77.1.1"
  tls       = true
}
service "rpc" { local = "127.0.0.1:8300" }
listen {
  address         = %q
  passthrough     = "127.0.0.1:8300"
  passthrough_tls = true
}
%s
`, l.host.Addr, lab.HostPort(l.host.Addr, 8300), lab.TLSBlock(ca, cert, key)))
	l.port = 8300

	bob := l.ca.Leaf(t, testpki.Server("dc2", "bob"))
	native, err := l.dial(bob, "consul/rpc-multi")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = native.Close() }()
	_, _ = io.WriteString(native, "question")
	raw := takes(t, server, "\x03")
	inner := tls.Server(raw, l.serverTLS(t))
	reads(t, inner, "\x04question")
	if names := inner.ConnectionState().PeerCertificates[0].DNSNames; names[0] != aliceName {
		t.Errorf("the server is called by %q, want the sidecar's certificate", names)
	}
	_, _ = io.WriteString(inner, "answer")
	reads(t, native, "answer")

	plain, err := l.others.Dial("tcp", lab.HostPort(l.host.Addr, 8300))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	_, _ = io.WriteString(plain, "\x04question")
	_, _ = io.WriteString(takes(t, server, "\x04question"), "answer")
	reads(t, plain, "answer")

	// The server's own TLS ends at the server: what it serves there is its.
	own := make(chan error, 1)
	go func() {
		c, err := server.Accept()
		if err == nil {
			defer func() { _ = c.Close() }()
			_, err = io.WriteString(tls.Server(c, l.serverTLS(t)), "from the server")
		}
		own <- err
	}()
	c, err := l.dial(bob)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	reads(t, c, "from the server")
	if err := <-own; err != nil {
		t.Error(err)
	}

	// Raft of another datacenter does not get through, nor a stranger.
	for protocol, cert := range map[string]*testpki.Cert{"consul/raft": bob, "consul/rpc-multi": nil} {
		if c, err := l.dial(cert, protocol); err == nil {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Errorf("%s was taken", protocol)
			}
			_ = c.Close()
		}
	}
}

func (l *lone) serverTLS(t *testing.T) *tls.Config {
	t.Helper()
	return &tls.Config{
		Certificates: []tls.Certificate{l.ca.Leaf(t, testpki.Server("dc1", "alice")).TLS},
		ClientCAs:    l.ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12,
	}
}

// takes accepts a connection that begins with some bytes.
func takes(t *testing.T, ln net.Listener, want string) net.Conn {
	t.Helper()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	reads(t, c, want)
	return c
}

// reads reads some bytes and no more.
func reads(t *testing.T, c net.Conn, want string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Errorf("read %q, %v, want %q", got, err, want)
	}
}
