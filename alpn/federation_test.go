package alpn

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/certs"
	"culvert/internal/h2"
	"culvert/internal/memnet"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

// newFederation is a site whose acceptor has the federation's protocols, and
// whose dialler is who it is told to be.
func newFederation(t testing.TB, who testpki.Option) *site {
	t.Helper()
	s := newSite(t)
	s.table = mustTable(t, services(), Raft, HTTP)
	s.accept = newAcceptor(t, s.table, s.accept.creds)
	s.dialer = NewDialer(s.table, load(t, s.ca, s.ca.Leaf(t, who)), DialerOptions{Metrics: s.dialed})
	return s
}

func TestDialProtocol(t *testing.T) {
	for protocol, kind := range map[string]Kind{Raft: KindRaft, HTTP: KindHTTP} {
		s := newFederation(t, testpki.Server("dc1", "amy"))
		client, server := testtcp.Pair(t)
		s.accept.serve(t, server)
		// Any server of the datacenter will do.
		dialed, err := s.dialer.DialProtocol(t.Context(), client, "server.dc1.consul", protocol)
		if err != nil {
			t.Fatal(err)
		}
		accepted := <-s.accept.conns
		want := Route{Protocol: protocol, Kind: kind}
		if dialed.Route() != want || accepted.Route() != want {
			t.Errorf("routes are %+v and %+v, want %+v", dialed.Route(), accepted.Route(), want)
		}
		if accepted.Peer().String() != "dc1/amy" || dialed.Peer().String() != "dc1/alice" {
			t.Errorf("peers are %v and %v", accepted.Peer(), dialed.Peer())
		}
		if count(s.dialed.dialOK) != 1 || count(s.accept.metrics.acceptOK) != 1 {
			t.Error("a handshake was not counted once")
		}
		dialed.Abort()
		accepted.Abort()
	}
}

func TestDialProtocolThatIsNotThere(t *testing.T) {
	s := newSite(t)
	for _, protocol := range []string{Raft, HTTP, "", "culvert/stream/1/rpc", "rpc"} {
		client, _ := testtcp.Pair(t)
		if c, err := s.dialer.DialProtocol(t.Context(), client, aliceName, protocol); err == nil {
			t.Errorf("dialled %q: %+v", protocol, c.Route())
		}
		wantClosed(t, client)
	}
}

// Who is admitted depends on what is negotiated. Who is not is told by an alert,
// and counted.
func TestAdmission(t *testing.T) {
	const ok = ""
	for name, c := range map[string]struct {
		who                         testpki.Option
		packet, stream, raft, http2 string // the reason, or ok
	}{
		"server of the same datacenter": {testpki.Server("dc1", "amy"), ok, ok, ok, ok},
		"server of another":             {testpki.Server("dc2", "bob"), ok, ok, "cert_datacenter", ok},
		"gateway":                       {testpki.Gateway("dc1", "gw1"), "cert_role", "cert_role", "cert_role", ok},
		"gateway of another":            {testpki.Gateway("dc2", "gw2"), "cert_role", "cert_role", "cert_role", ok},
		"client":                        {testpki.Client("dc1"), "cert_role", "cert_role", "cert_role", "cert_role"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFederation(t, c.who)
			creds := s.dialer.creds
			for protocol, want := range map[string]string{
				"culvert/packet/1/gossip-packet": c.packet,
				"consul/wan-gossip/packet":       c.packet,
				"culvert/stream/1/rpc":           c.stream,
				Raft:                             c.raft,
				HTTP:                             c.http2,
			} {
				// Twice: with one protocol's ticket for the next, too.
				for range 2 {
					s.accept.refused = nil
					client, server := testtcp.Pair(t)
					done := s.accept.serve(t, server)
					tlsClient := plainClient(client, creds, protocol)
					if want == ok {
						if err := tlsClient.Handshake(); err != nil {
							t.Fatalf("%s: %v", protocol, err)
						}
						accepted := <-s.accept.conns
						<-done
						_, _ = accepted.Write([]byte("x")) // and with it the ticket is read
						if _, err := tlsClient.Read(make([]byte, 1)); err != nil {
							t.Errorf("%s: %v", protocol, err)
						}
						accepted.Abort()
						s.accept.wantRefused(t)
						continue
					}
					if _, err := tlsClient.Read(make([]byte, 1)); !errors.As(refused(err), new(*RefusedError)) {
						t.Errorf("%s: the client reads %v, want an alert", protocol, err)
					}
					client.Close()
					<-done
					s.accept.wantRefused(t, want)
				}
			}
		})
	}
}

// With h2 in the list crypto/tls would let an http/1.1 client in without a
// protocol. Neither that nor any other reaches a handler.
func TestHTTP1IsRefused(t *testing.T) {
	for name, protos := range map[string][]string{
		reasonUnknownALPN: {"http/1.1"}, reasonNoALPN: nil,
	} {
		s := newFederation(t, testpki.Server("dc2", "bob"))
		client, server := testtcp.Pair(t)
		done := s.accept.serve(t, server)
		if err := plainClient(client, s.dialer.creds, protos...).Handshake(); !errors.As(refused(err), new(*RefusedError)) {
			t.Errorf("%q: %v, want an alert", protos, err)
		}
		client.Close()
		<-done
		s.accept.wantRefused(t, name)

		// And past the look at the hello.
		client, server = testtcp.Pair(t)
		result := make(chan error, 1)
		go func() {
			_, err := s.accept.handshake(t.Context(), server, nil)
			server.Close()
			result <- err
		}()
		c := plainClient(client, s.dialer.creds, protos...)
		_, _ = c.Read(make([]byte, 1))
		client.Close()
		if reason, _ := classify(<-result); reason != reasonNoALPN {
			t.Errorf("%q: the handshake ended with reason %s", protos, reason)
		}
	}
}

// A drain waits for streams, and not for what does not end by itself.
func TestLasting(t *testing.T) {
	for protocol, want := range map[string]bool{
		"culvert/packet/1/gossip-packet": true, "culvert/stream/1/rpc": false, Raft: true, HTTP: true,
	} {
		s := newFederation(t, testpki.Server("dc1", "amy"))
		client, server := memnet.Pipe()
		established := make(chan bool, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.accept.ServeConn(t.Context(), sniff.NewConn(server, nil), func(lasting bool) bool { established <- lasting; return true })
		}()
		c := plainClient(client, s.dialer.creds, protocol)
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		if lasting := <-established; lasting != want {
			t.Errorf("%s: lasting is %t", protocol, lasting)
		}
		<-done
		client.Abort()
	}
}

// A watched connection tells of its Close.
type watched struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func watch(c net.Conn) *watched { return &watched{Conn: c, closed: make(chan struct{})} }

func (w *watched) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}

// HTTP/2 on both sides, with net/http on the tls.Conn within the Conn: who asks
// is known by it alone, and what it closes is closed beneath.
func TestHTTPOverConns(t *testing.T) {
	s := newFederation(t, testpki.Gateway("dc2", "gw2"))
	creds := s.accept.creds
	server := h2.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := creds.PeerIdentity(*r.TLS)
		if err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, string(id.Role)+" "+id.String())
	}), h2.ServerOptions{})
	var raw []*watched
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan struct{}, 1)
	transport := h2.NewTransport(func(dialing context.Context, address string) (*tls.Conn, error) {
		client, accepted := testtcp.Pair(t)
		near, far := watch(client), watch(accepted)
		raw = append(raw, near, far)
		s.accept.serve(t, far)
		c, err := s.dialer.DialProtocol(dialing, near, strings.TrimSuffix(address, ":443"), HTTP)
		if err != nil {
			return nil, err
		}
		go func() {
			server.ServeConn(ctx, (<-s.accept.conns).Conn)
			served <- struct{}{}
		}()
		return c.Conn, nil
	}, h2.TransportOptions{})
	for range 2 {
		resp, err := (&http.Client{Transport: transport}).Get("https://" + aliceName + "/v1/federation-states")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) != "gateway dc2/gw2" {
			t.Errorf("answered %q", body)
		}
	}
	stop()
	if len(raw) != 2 {
		t.Fatalf("%d connections were made", len(raw)/2)
	}
	for what, end := range map[string]<-chan struct{}{
		"ServeConn": served, "the client's connection": raw[0].closed, "the server's connection": raw[1].closed,
	} {
		select {
		case <-end:
		case <-time.After(10 * time.Second):
			t.Errorf("%s has not ended", what)
		}
	}
	transport.CloseIdleConnections()
}

// Closing the tls.Conn within a Conn closes the connection, and a read of the
// Conn that waits ends.
func TestEmbeddedClose(t *testing.T) {
	s := newFederation(t, testpki.Server("dc1", "amy"))
	dialed, accepted := s.connectTCP(t, "rpc")
	read := make(chan error, 1)
	go func() {
		_, err := accepted.Read(make([]byte, 1))
		read <- err
	}()
	if err := accepted.Conn.Close(); err != nil {
		t.Error(err)
	}
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	wantClosed(t, accepted.TCP())
	if _, err := dialed.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other side reads %v, want the end that was meant", err)
	}
}

var _ Credentials = (*certs.Source)(nil)
