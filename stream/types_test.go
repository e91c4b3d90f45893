package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
)

// outbound streams what server writes with a service that has types.
func outbound(t *testing.T, o OutboundOptions, dial DialPeer) (server *net.TCPConn, out *Outbound, done <-chan struct{}) {
	t.Helper()
	server, captured := testtcp.Pair(t)
	o.Typed = []string{"rpc"}
	out = NewOutbound(dial, o)
	ended := make(chan struct{})
	go func() { defer close(ended); out.Stream(t.Context(), bob, "rpc", captured) }()
	t.Cleanup(func() { pipe.Abort(server); <-ended })
	return server, out, ended
}

// never is a DialPeer that must not be called.
func never(t *testing.T) DialPeer {
	return func(context.Context, catalog.Key, Wanted) (Reached, error) {
		t.Error("the peer was dialled")
		return Reached{}, errors.New("dialled")
	}
}

func wantReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
}

// The type is known before the dial. A sidecar gets it with the rest, and who was
// told gets what is behind it.
func TestOutboundTypes(t *testing.T) {
	for name, told := range map[string]bool{"a sidecar": false, "a native server": true} {
		t.Run(name, func(t *testing.T) {
			peer, far := testtcp.Pair(t)
			server, o, done := outbound(t, OutboundOptions{}, func(_ context.Context, _ catalog.Key, want Wanted) (Reached, error) {
				if want.First != 4 {
					t.Errorf("dialled for type %d, want 4", want.First)
				}
				return Reached{Conn: far, Told: told}, nil
			})
			_, _ = io.WriteString(server, "\x04question")
			_ = server.CloseWrite()
			want := "\x04question"
			if told {
				want = "question"
			}
			if got, err := io.ReadAll(peer); err != nil || string(got) != want {
				t.Errorf("the peer read %q, %v, want %q", got, err, want)
			}
			_, _ = io.WriteString(peer, "answer")
			_ = peer.Close()
			if got, err := io.ReadAll(server); err != nil || string(got) != "answer" {
				t.Errorf("the server read %q, %v", got, err)
			}
			within(t, "the end of Stream", func() { <-done })
			if s := o.Peer(bob); s.BytesSent != uint64(len(want)) || s.BytesReceived != 6 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// Who only looks whether somebody answers makes nobody dial.
func TestOutboundProbe(t *testing.T) {
	server, o, done := outbound(t, OutboundOptions{}, never(t))
	_ = server.CloseWrite()
	if got, err := io.ReadAll(server); err != nil || len(got) > 0 {
		t.Errorf("the server read %q, %v, want an end", got, err)
	}
	within(t, "Stream", func() { <-done })
	if s := o.Peer(bob); s.LastError != "" {
		t.Errorf("stats %+v", s)
	}
}

func TestOutboundWithoutAType(t *testing.T) {
	t.Parallel()
	began := time.Now()
	server, o, done := outbound(t, OutboundOptions{}, never(t))
	wantReset(t, server)
	if took := time.Since(began); took < TypeTimeout-100*time.Millisecond {
		t.Errorf("refused after %v, want %v", took, TypeTimeout)
	}
	<-done
	if s := o.Peer(bob); s.LastError != ErrNoType.Error() {
		t.Errorf("stats %+v", s)
	}
}

// A peer that is refused is refused at once: nobody waits for a type.
func TestOutboundRefuse(t *testing.T) {
	away := errors.New("away")
	server, o, done := outbound(t, OutboundOptions{Refuse: func(to catalog.Key) error {
		if to != bob {
			t.Errorf("asked for %v", to)
		}
		return away
	}}, never(t))
	wantReset(t, server)
	<-done
	if s := o.Peer(bob); s.LastError != "away" {
		t.Errorf("stats %+v", s)
	}
}

// A stop does not wait for a type.
func TestOutboundStopsWithoutAType(t *testing.T) {
	server, captured := testtcp.Pair(t)
	o := NewOutbound(never(t), OutboundOptions{Typed: []string{"rpc"}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); o.Stream(ctx, bob, "rpc", captured) }()
	cancel()
	wantReset(t, server)
	within(t, "Stream", func() { <-done })
	if s := o.Peer(bob); s.LastError != "" {
		t.Errorf("stats %+v", s)
	}
}

// inward serves a connection of bob's, of dc2, and returns the peer's end and,
// from the channel, the local server's.
func inward(t *testing.T, own string, first Type, secure func(context.Context, *net.TCPConn) (net.Conn, error)) (peer *net.TCPConn, servers <-chan *net.TCPConn, i *Inbound) {
	t.Helper()
	peer, accepted := testtcp.Pair(t)
	dialled := make(chan *net.TCPConn, 1)
	i = NewInbound(func(context.Context, catalog.Key, string) (*net.TCPConn, error) {
		near, far := testtcp.Pair(t)
		dialled <- far
		return near, nil
	}, InboundOptions{Datacenter: own, Typed: map[string]TypeRules{
		"rpc": {SameDatacenter: []Type{1, 9}, TLS: []Type{3, 7}, TLSFor: 3, Secure: secure},
	}})
	ended := make(chan struct{})
	go func() { defer close(ended); i.ServeConn(t.Context(), bob, "rpc", first, accepted) }()
	t.Cleanup(func() {
		pipe.Abort(peer)
		select {
		case server := <-dialled:
			pipe.Abort(server)
		default:
		}
		<-ended
	})
	return peer, dialled, i
}

// The server gets the byte wherever it was: in the stream or in the protocol.
func TestInboundTypes(t *testing.T) {
	for name, c := range map[string]struct {
		own   string
		first Type
		send  string
	}{
		"of a sidecar":               {"dc1", Untyped, "\x04question"},
		"of a native server":         {"dc1", 4, "question"},
		"raft within the datacenter": {"dc2", Untyped, "\x01question"},
		"native raft":                {"dc2", 9, "question"},
		"TLS inside":                 {"dc1", Untyped, "\x03question"},
		"unknown":                    {"dc1", Untyped, "\xc8question"},
	} {
		t.Run(name, func(t *testing.T) {
			peer, servers, i := inward(t, c.own, c.first, nil)
			_, _ = io.WriteString(peer, c.send)
			_ = peer.CloseWrite()
			want := c.send
			if c.first != Untyped {
				want = string([]byte{c.first.Byte()}) + c.send
			}
			server := <-servers
			if got, err := io.ReadAll(server); err != nil || string(got) != want {
				t.Errorf("the server read %q, %v, want %q", got, err, want)
			}
			if s := i.Peer(bob); s.BytesReceived != uint64(len(want)) {
				t.Errorf("stats %+v, want %d bytes", s, len(want))
			}
			pipe.Abort(server)
		})
	}
}

// Raft is a datacenter's own, whichever way it is said.
func TestInboundRefusesForeignRaft(t *testing.T) {
	for name, c := range map[string]struct {
		first Type
		send  string
	}{
		"raft": {Untyped, "\x01x"}, "forwarding": {Untyped, "\x09x"}, "told": {1, "x"}, "told forwarding": {9, "x"},
	} {
		t.Run(name, func(t *testing.T) {
			peer, servers, i := inward(t, "dc1", c.first, nil)
			// The reset may be there before the write, which takes the error then.
			if _, err := io.WriteString(peer, c.send); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				wantReset(t, peer)
			}
			if len(servers) > 0 {
				t.Error("the server was dialled")
			}
			if s := i.Peer(bob); !strings.Contains(s.LastError, "is taken from servers of dc1 alone") || s.Total != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func TestInboundWithoutAType(t *testing.T) {
	t.Parallel()
	peer, servers, i := inward(t, "dc1", Untyped, nil)
	wantReset(t, peer)
	if s := i.Peer(bob); s.LastError != ErrNoType.Error() || len(servers) > 0 {
		t.Errorf("stats %+v, %d dials", s, len(servers))
	}
}

// Who ends without having said anything gets an end.
func TestInboundProbe(t *testing.T) {
	peer, servers, i := inward(t, "dc1", Untyped, nil)
	_ = peer.CloseWrite()
	if got, err := io.ReadAll(peer); err != nil || len(got) > 0 {
		t.Errorf("the peer read %q, %v, want an end", got, err)
	}
	if s := i.Peer(bob); s.LastError != "" || len(servers) > 0 {
		t.Errorf("stats %+v, %d dials", s, len(servers))
	}
}

// Where the server demands TLS it gets it, but for what has TLS inside already.
func TestInboundSecures(t *testing.T) {
	ca := testpki.New(t, "consul")
	alice := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	secure := func(ctx context.Context, server *net.TCPConn) (net.Conn, error) {
		c := tls.Client(server, alice.ClientConfig("server.dc1.consul", nil))
		return c, c.HandshakeContext(ctx)
	}
	t.Run("plain", func(t *testing.T) {
		peer, servers, _ := inward(t, "dc1", 4, secure)
		_, _ = io.WriteString(peer, "question")
		server := <-servers
		var first [1]byte
		if _, err := io.ReadFull(server, first[:]); err != nil || first[0] != 3 {
			t.Fatalf("the server read %v, %v, want type 3", first, err)
		}
		c := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{ca.Leaf(t, testpki.Server("dc1", "alice")).TLS}})
		got := make([]byte, 9)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "\x04question" {
			t.Errorf("the server read %q, %v inside", got, err)
		}
		_, _ = io.WriteString(c, "answer")
		answer := make([]byte, 6)
		if _, err := io.ReadFull(peer, answer); err != nil || string(answer) != "answer" {
			t.Errorf("the peer read %q, %v", answer, err)
		}
		pipe.Abort(server)
	})
	t.Run("TLS inside", func(t *testing.T) {
		peer, servers, _ := inward(t, "dc1", Untyped, secure)
		_, _ = io.WriteString(peer, "\x07hello")
		got := make([]byte, 6)
		server := <-servers
		if _, err := io.ReadFull(server, got); err != nil || string(got) != "\x07hello" {
			t.Errorf("the server read %q, %v", got, err)
		}
		pipe.Abort(server)
	})
	t.Run("refused", func(t *testing.T) {
		peer, servers, i := inward(t, "dc1", 4, secure)
		server := <-servers
		pipe.Abort(server)
		wantReset(t, peer)
		if s := i.Peer(bob); s.LastError == "" || s.Total != 0 {
			t.Errorf("stats %+v, want an error", s)
		}
	})
}
