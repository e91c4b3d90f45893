package alpn

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"testing"

	"culvert/certs"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

func typed() []Service {
	return []Service{
		{Name: "gossip-packet", Kind: KindPacket, ALPN: "consul/wan-gossip/packet"},
		{Name: "rpc", Kind: KindStream, Types: ConsulTypes()},
	}
}

// The names are Consul's: each stands for its byte, and only for a connection
// that begins with it is it offered.
func TestTypesOfATable(t *testing.T) {
	table := mustTable(t, typed())
	want := map[byte]string{
		0: "consul/rpc-single", 1: "consul/raft", 4: "consul/rpc-multi", 5: "consul/rpc-snapshot",
		6: "consul/rpc-gossip", 8: "consul/rpc-grpc", 9: "consul/raft-forwarding",
	}
	for first := range 256 {
		offer := []string{"culvert/stream/1/rpc"}
		if name := want[byte(first)]; name != "" {
			offer = append(offer, name)
			r, ok := table.Lookup(name)
			if !ok || r.Service != "rpc" || !r.Native || r.Type == nil || int(r.Type.Byte) != first {
				t.Errorf("Lookup(%q) = %+v, %v", name, r, ok)
			}
			if !slices.Contains(table.Protocols(), name) {
				t.Errorf("%q is not accepted", name)
			}
		}
		first := byte(first)
		if got := table.OfferStream(StreamOffer{Service: "rpc", First: &first}); !slices.Equal(got, offer) {
			t.Errorf("offered for %d: %q, want %q", first, got, offer)
		}
	}
	if got := table.Offer("rpc"); !slices.Equal(got, []string{"culvert/stream/1/rpc"}) {
		t.Errorf("offered without a type: %q", got)
	}
	if got := table.OfferStream(StreamOffer{Service: "nothing", First: new(byte)}); got != nil {
		t.Errorf("offered for an unknown service: %q", got)
	}
	if r, _ := table.Lookup("culvert/stream/1/rpc"); r.Type != nil {
		t.Errorf("Culvert's own name tells a type: %+v", r)
	}
}

// newTyped is alice of dc1, who accepts the types, and a dialler.
func newTyped(t *testing.T, who testpki.Option) *site {
	t.Helper()
	s := newSite(t)
	s.table = mustTable(t, typed())
	s.accept = newAcceptor(t, s.table, s.accept.creds)
	s.dialer = NewDialer(s.table, load(t, s.ca, s.ca.Leaf(t, who)), DialerOptions{})
	return s
}

func offering(first byte) StreamOffer { return StreamOffer{Service: "rpc", First: &first} }

// Two sidecars speak Culvert's protocol, whatever the type; a native server is
// told it by a name.
func TestDialStream(t *testing.T) {
	s := newTyped(t, testpki.Server("dc2", "bob"))
	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	c, err := s.dialer.DialStream(t.Context(), client, aliceName, offering(4))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	if r := c.Route(); r.Protocol != "culvert/stream/1/rpc" || r.Type != nil {
		t.Errorf("two sidecars negotiated %+v", r)
	}
	native := func(first byte, protos ...string) (*Conn, error) {
		client, server := testtcp.Pair(t)
		go func() {
			c := tls.Server(server, &tls.Config{
				Certificates: []tls.Certificate{s.ca.Leaf(t, testpki.Server("dc1", "alice")).TLS}, NextProtos: protos, ClientAuth: tls.RequireAnyClientCert,
			})
			_ = c.Handshake() // the dialler tells how it ended
		}()
		return s.dialer.DialStream(t.Context(), client, aliceName, offering(first))
	}
	c, err = native(5, "consul/rpc-multi", "consul/rpc-snapshot")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	if r := c.Route(); r.Protocol != "consul/rpc-snapshot" || r.Type == nil || r.Type.Byte != 5 {
		t.Errorf("with a native server: %+v", r)
	}
	for _, first := range []byte{ConsulTLS, ConsulTLSInsecure, 2, 255} {
		if _, err := native(first, "consul/rpc-multi", "consul/rpc-snapshot"); !errors.As(err, new(*RefusedError)) {
			t.Errorf("type %d with a native server: %v, want an alert", first, err)
		}
	}
}

// Raft is taken from the own datacenter alone, by whichever name.
func TestTypesOfOneDatacenter(t *testing.T) {
	for _, name := range []string{"consul/raft", "consul/raft-forwarding"} {
		for who, refused := range map[string][]string{"dc1": nil, "dc2": {certPrefix + certs.ReasonDatacenter}} {
			s := newTyped(t, testpki.Server(who, "carol"))
			client, server := testtcp.Pair(t)
			done := s.accept.serve(t, server)
			c := plainClient(client, s.dialer.creds, name)
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			if refused == nil {
				accepted := <-s.accept.conns
				if r := accepted.Route(); r.Protocol != name {
					t.Errorf("negotiated %+v", r)
				}
				accepted.Abort()
			} else if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("a server of another datacenter was taken")
			}
			_ = client.Close()
			<-done
			s.accept.wantRefused(t, refused...)
		}
	}
}

// Foreign gets what offers nothing that is known, untouched, and nothing else.
func TestForeign(t *testing.T) {
	s := newSite(t)
	got := make(chan []byte, 1)
	s.accept.opts.Foreign = func(_ context.Context, c *sniff.Conn, establish func(bool) bool) {
		if !establish(false) {
			t.Error("not established")
		}
		raw, peeked := c.Detach()
		_, _ = io.WriteString(raw, "foreign")
		_ = raw.Close()
		got <- peeked
	}
	for name, protos := range map[string][]string{"no ALPN": nil, "unknown ALPN": {"x/y"}, "HTTP": {"h2", "http/1.1"}} {
		hello := clientHello(t, protos...)
		client, server := testtcp.Pair(t)
		s.accept.serve(t, server)
		if _, err := client.Write(hello); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(client); err != nil || string(answer) != "foreign" {
			t.Errorf("%s: answered %q, %v", name, answer, err)
		}
		if peeked := <-got; !slices.Equal(peeked, hello) {
			t.Errorf("%s: %d bytes were handed on, %d sent", name, len(peeked), len(hello))
		}
	}
	s.accept.wantRefused(t)

	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	if _, err := client.Write([]byte{22, 3, 1, 0, 4, 2, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if answer, _ := io.ReadAll(client); len(answer) != 7 {
		t.Errorf("what is no hello was answered % x, want an alert", answer)
	}
	s.accept.wantRefused(t, "hello_malformed")
	if dialed, _ := s.connectTCP(t, "rpc"); dialed.Route().Service != "rpc" {
		t.Errorf("negotiated %+v", dialed.Route())
	}
}

// DialServer verifies the server and offers nothing.
func TestDialServer(t *testing.T) {
	s := newSite(t)
	dial := func(who testpki.Option) (*Conn, error) {
		client, server := testtcp.Pair(t)
		go func() {
			c := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{s.ca.Leaf(t, who).TLS}, ClientAuth: tls.RequireAnyClientCert})
			_, _ = io.WriteString(c, "hello") // the dialler tells how it ended
		}()
		return s.dialer.DialServer(t.Context(), net.Conn(client), "server.dc2.consul")
	}
	c, err := dial(testpki.Server("dc2", "bob"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" || c.Route() != (Route{}) {
		t.Errorf("read %q, %v on %+v", got, err, c.Route())
	}
	if _, err := dial(testpki.Server("dc1", "alice")); !errors.As(err, new(*certs.PeerError)) {
		t.Errorf("a server of another datacenter: %v", err)
	}
}

// A session is preferred where both sides have it, and asked for alone where none of
// the services is meant; a side without it gets the stream as before.
func TestSessions(t *testing.T) {
	table := mustTable(t, typed(), Session)
	if got := table.Protocols(); got[0] != Session {
		t.Errorf("accepted first: %q", got[0])
	}
	first := byte(4)
	for _, c := range []struct {
		o    StreamOffer
		want []string
	}{
		{StreamOffer{Session: true}, []string{Session}},
		{StreamOffer{Service: "rpc", Session: true}, []string{Session, "culvert/stream/1/rpc"}},
		{StreamOffer{Service: "rpc", First: &first, Session: true}, []string{Session, "culvert/stream/1/rpc", "consul/rpc-multi"}},
		{StreamOffer{Service: "rpc", First: &first}, []string{"culvert/stream/1/rpc", "consul/rpc-multi"}},
		{StreamOffer{Service: "nothing", Session: true}, nil},
	} {
		if got := table.OfferStream(c.o); !slices.Equal(got, c.want) {
			t.Errorf("offered for %+v: %q, want %q", c.o, got, c.want)
		}
	}
	if got := mustTable(t, typed()).OfferStream(StreamOffer{Session: true}); got != nil {
		t.Errorf("offered without sessions: %q", got)
	}
	for name, far := range map[string]*Table{Session: table, "culvert/stream/1/rpc": mustTable(t, typed())} {
		s := newTyped(t, testpki.Server("dc2", "bob"))
		s.dialer.table = table
		s.accept = newAcceptor(t, far, s.accept.creds)
		client, server := testtcp.Pair(t)
		s.accept.serve(t, server)
		c, err := s.dialer.DialStream(t.Context(), client, aliceName, StreamOffer{Service: "rpc", Session: true})
		if err != nil {
			t.Fatal(err)
		}
		if r := c.Route(); r.Protocol != name || (r.Kind == KindSession) != (name == Session) {
			t.Errorf("negotiated %+v, want %s", r, name)
		}
		c.Abort()
	}
}
