package alpn

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap/zapcore"

	"culvert/certs"
	"culvert/internal/memnet"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
)

// Those that say nothing useful get their alert before any handshake, and each
// is counted once.
func TestRefusedBeforeHandshake(t *testing.T) {
	hello := clientHello(t, "rpc")
	large := bytes.Clone(hello)
	copy(large[6:9], []byte{0xff, 0xff, 0xff})
	for name, c := range map[string]struct {
		send   []byte
		end    bool
		reason string
		alert  byte
	}{
		"no ALPN":          {clientHello(t), false, reasonNoALPN, 120},
		"unknown ALPN":     {clientHello(t, "h2", "http/1.1"), false, reasonUnknownALPN, 120},
		"http/1.1 alone":   {clientHello(t, "http/1.1"), false, reasonUnknownALPN, 120},
		"no hello":         {[]byte{22, 3, 1, 0, 4, 2, 0, 0, 0}, false, "hello_malformed", 50},
		"too large":        {large, false, "hello_too_large", 50},
		"half and the end": {hello[:len(hello)/2], true, "hello_truncated", 0},
		"nothing at all":   {nil, true, "hello_truncated", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			client, server := testtcp.Pair(t)
			done := s.accept.serve(t, server)
			if _, err := client.Write(c.send); err != nil {
				t.Fatal(err)
			}
			if c.end {
				_ = client.CloseWrite()
			}
			got, err := io.ReadAll(client)
			if c.alert == 0 {
				if len(got) > 0 {
					t.Errorf("answered % x", got)
				}
			} else if want := []byte{21, 3, 3, 0, 2, 2, c.alert}; err != nil || !bytes.Equal(got, want) {
				t.Errorf("answered % x, %v, want % x", got, err, want)
			}
			client.Close()
			<-done
			s.accept.wantRefused(t, c.reason)
			if n := count(s.accept.metrics.acceptError); n != 0 {
				t.Errorf("%d handshakes counted, none was made", n)
			}
			if n := s.accept.log.FilterLevelExact(zapcore.WarnLevel).Len(); n != 0 {
				t.Errorf("a stranger caused %d warnings", n)
			}
		})
	}
}

// clientHello is what crypto/tls sends first.
func clientHello(t *testing.T, protos ...string) []byte {
	t.Helper()
	c, s := net.Pipe()
	defer s.Close()
	go func() {
		defer c.Close()
		_ = tls.Client(c, &tls.Config{ServerName: aliceName, NextProtos: protos, MinVersion: tls.VersionTLS13}).Handshake()
	}()
	header := make([]byte, 5)
	if _, err := io.ReadFull(s, header); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(header[3])<<8|int(header[4]))
	if _, err := io.ReadFull(s, body); err != nil {
		t.Fatal(err)
	}
	return append(header, body...)
}

// A client that stops in the middle of a phase is given up at its end.
func TestTimeouts(t *testing.T) {
	hello := clientHello(t, "culvert/stream/1/rpc")
	for name, c := range map[string]struct {
		send   []byte
		reason string
	}{
		"half a hello":             {hello[:100], "hello_timeout"},
		"a hello and nothing more": {hello, reasonHandshakeTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				client, server := memnet.Pipe()
				defer client.Close()
				start := time.Now()
				done := s.accept.serve(t, server)
				if _, err := client.Write(c.send); err != nil {
					t.Fatal(err)
				}
				<-done
				if d := time.Since(start); d < 10*time.Second || d > 12*time.Second {
					t.Errorf("given up after %v", d)
				}
				s.accept.wantRefused(t, c.reason)
			})
		})
	}
}

// Each peer that is not who it should be gets its own reason and one line.
func TestBadPeers(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		other   bool // of another CA
		options []testpki.Option
		reason  string
	}{
		"other CA":      {true, []testpki.Option{testpki.Server("dc2", "bob")}, "cert_other_ca"},
		"expired":       {false, []testpki.Option{testpki.Server("dc2", "bob"), testpki.NotBefore(now.Add(-2 * time.Hour)), testpki.NotAfter(now.Add(-time.Hour))}, "cert_expired"},
		"not yet valid": {false, []testpki.Option{testpki.Server("dc2", "bob"), testpki.NotBefore(now.Add(time.Hour))}, "cert_not_yet_valid"},
		"other domain":  {false, []testpki.Option{testpki.Names("bob.server.dc2.example")}, "cert_other_domain"},
		"no client use": {false, []testpki.Option{testpki.Server("dc2", "bob"), testpki.Usages(x509.ExtKeyUsageServerAuth)}, "cert_key_usage"},
		"client role":   {false, []testpki.Option{testpki.Client("dc2")}, "cert_role"},
		"gateway role":  {false, []testpki.Option{testpki.Gateway("dc2", "gw")}, "cert_role"},
		"no names":      {false, []testpki.Option{testpki.NoNames()}, "cert_no_names"},
		"two nodes":     {false, []testpki.Option{testpki.Names("a.server.dc2.consul", "b.server.dc2.consul")}, "cert_conflicting_names"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			ca := s.ca
			if c.other {
				ca = testpki.New(t, "consul")
			}
			cert := ca.Leaf(t, c.options...).TLS
			client, server := testtcp.Pair(t)
			done := s.accept.serve(t, server)
			// The certificate is sent unasked-for, as crypto/tls would not.
			bad := tls.Client(client, &tls.Config{
				ServerName: aliceName, RootCAs: s.ca.Pool(), NextProtos: []string{"culvert/stream/1/rpc"},
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
			})
			_, _ = bad.Write([]byte("not a byte of this may arrive"))
			_, err := bad.Read(make([]byte, 1))
			if !errors.As(refused(err), new(*RefusedError)) {
				t.Errorf("the peer reads %v, want an alert", err)
			}
			client.Close()
			<-done
			s.accept.wantRefused(t, c.reason)
			if n := count(s.accept.metrics.acceptError); n != 1 {
				t.Errorf("%d failed handshakes counted", n)
			}
			lines := s.accept.log.FilterLevelExact(zapcore.WarnLevel).All()
			if len(lines) != 1 {
				t.Fatalf("%d warnings, want 1", len(lines))
			}
			fields := lines[0].ContextMap()
			for _, f := range []string{"wanted", "found", "remote", "reason"} {
				if v, _ := fields[f].(string); v == "" {
					t.Errorf("field %s is missing: %v", f, fields)
				}
			}
		})
	}
}

func TestNoClientCertificate(t *testing.T) {
	s := newSite(t)
	client, server := testtcp.Pair(t)
	done := s.accept.serve(t, server)
	bare := tls.Client(client, &tls.Config{ServerName: aliceName, RootCAs: s.ca.Pool(), NextProtos: []string{"culvert/stream/1/rpc"}})
	if _, err := bare.Read(make([]byte, 1)); !errors.As(refused(err), new(*RefusedError)) {
		t.Errorf("the peer reads %v, want an alert", err)
	}
	client.Close()
	<-done
	s.accept.wantRefused(t, "cert_no_certificate")
}

// One source that keeps failing is one line in ten seconds, not one a try.
func TestWarningsAreSampled(t *testing.T) {
	s := newSite(t)
	other := testpki.New(t, "consul")
	stranger := load(t, other, other.Leaf(t, testpki.Server("dc2", "bob")))
	for range 5 {
		client, server := testtcp.Pair(t)
		done := s.accept.serve(t, server)
		_ = plainClient(client, insecure{stranger}, "culvert/stream/1/rpc").Handshake()
		_, _ = io.ReadAll(client)
		client.Close()
		<-done
	}
	if n := len(s.accept.reasons(t)); n != 5 {
		t.Errorf("%d connections counted, want 5", n)
	}
	if n := s.accept.log.FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
}

// insecure believes any server: a bad client is not bound by our rules.
type insecure struct{ Credentials }

func (i insecure) ClientConfig(name string, protos []string) *tls.Config {
	c := i.Credentials.ClientConfig(name, protos)
	c.InsecureSkipVerify, c.VerifyConnection = true, nil
	return c
}

// Where nothing is negotiated, whatever crypto/tls makes of that, no handler is
// reached.
func TestEmptyProtocolIsRefused(t *testing.T) {
	s := newSite(t)
	a := newAcceptor(t, s.table, withoutProtocols{s.accept.creds})
	client, server := testtcp.Pair(t)
	done := a.serve(t, server)
	c := plainClient(client, s.dialer.creds, "culvert/stream/1/rpc")
	_ = c.Handshake()
	_, _ = io.ReadAll(c)
	client.Close()
	<-done
	a.wantRefused(t, reasonNoALPN)
	if len(a.conns) != 0 {
		t.Error("a handler was given a connection without a protocol")
	}
}

type withoutProtocols struct{ Credentials }

func TestNewServerWantsHandlers(t *testing.T) {
	ca := testpki.New(t, "consul")
	creds := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	_, err := NewServer(mustTable(t, services()), creds, ServerOptions{})
	if err == nil || !strings.Contains(err.Error(), "no handler") {
		t.Errorf("NewServer without handlers: %v", err)
	}
	h := HandlerFunc(func(context.Context, *Conn) {})
	for protocol, o := range map[string]ServerOptions{
		Raft: {Packet: h, Stream: h, HTTP: h},
		HTTP: {Packet: h, Stream: h, Raft: h},
	} {
		_, err := NewServer(mustTable(t, services(), Raft, HTTP), creds, o)
		if err == nil || !strings.Contains(err.Error(), protocol) || !strings.Contains(err.Error(), "no handler") {
			t.Errorf("NewServer without a handler for %s: %v", protocol, err)
		}
	}
}

// When the process stops, a handshake in progress ends with it, and that is not
// the peer's doing.
func TestStopDuringHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		client, server := memnet.Pipe()
		defer client.Close()
		ctx, cancel := contextWithCancel(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.accept.ServeConn(ctx, sniffConn(server), func(bool) bool { return true })
		}()
		if _, err := client.Write(clientHello(t, "culvert/stream/1/rpc")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		cancel()
		<-done
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("ServeConn went on for %v", d)
		}
		s.accept.wantRefused(t)
	})
}

func (w withoutProtocols) ServerConfig(_ []string, admit func(string) (certs.Admission, error)) *tls.Config {
	return w.Credentials.ServerConfig(nil, admit)
}
