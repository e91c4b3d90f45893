package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

// A chain is what is between two servers: a sidecar at each end, and a gateway of
// each datacenter on the way, which knows nothing of TLS.
type chain struct {
	client *net.TCPConn // of the server that dials
	server *net.TCPConn // of the one that is dialled
}

func newChain(t *testing.T) *chain {
	t.Helper()
	ca := testpki.New(t, "consul")
	table, err := alpn.NewTable([]alpn.Service{{Name: "rpc", Kind: alpn.KindStream}})
	if err != nil {
		t.Fatal(err)
	}
	c := &chain{}
	server, dialled := testtcp.Pair(t)
	c.server = server
	in := NewInbound(func(context.Context, catalog.Key, string) (*net.TCPConn, error) { return dialled, nil },
		InboundOptions{Datacenter: "dc2", Typed: map[string]TypeRules{"rpc": {TLS: []Type{3}}}})
	serve := alpn.HandlerFunc(func(ctx context.Context, conn *alpn.Conn) { in.ServeConn(ctx, bob, "rpc", Untyped, conn) })
	acceptor, err := alpn.NewServer(table, load(t, ca, ca.Leaf(t, testpki.Server("dc2", "bob"))), alpn.ServerOptions{Stream: serve, Packet: serve})
	if err != nil {
		t.Fatal(err)
	}
	dialer := alpn.NewDialer(table, load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice"))), alpn.DialerOptions{})
	running := func(f func()) {
		done := make(chan struct{})
		go func() { defer close(done); f() }()
		t.Cleanup(func() { <-done })
	}
	out := NewOutbound(func(ctx context.Context, _ catalog.Key, want Wanted) (Reached, error) {
		near, there := testtcp.Pair(t)
		for range 2 {
			from, to := testtcp.Pair(t)
			behind := there
			running(func() { pipe.Join(behind, from, pipe.Options{}) })
			there = to
		}
		last := there
		running(func() { acceptor.ServeConn(t.Context(), sniff.NewConn(last, nil), func(bool) bool { return true }) })
		conn, err := dialer.Dial(ctx, near, "bob.server.dc2.consul", want.Service)
		return Reached{Conn: conn}, err
	}, OutboundOptions{Typed: []string{"rpc"}})
	client, captured := testtcp.Pair(t)
	c.client = client
	running(func() { out.Stream(t.Context(), bob, "rpc", captured) })
	t.Cleanup(func() { pipe.Abort(client); pipe.Abort(server) }) // what runs ends
	return c
}

// A Consul server answers for a snapshot over TLS of its own, and closes with its
// client's close_notify unread, which makes its kernel reset the connection behind
// the answer. All that it sent before arrives, through all relays, whether the
// client's words arrive before the reset or meet it on their way.
func TestAnswerOfAServerThatClosesUnread(t *testing.T) {
	answer := bytes.Repeat([]byte("answer"), 5000)
	for name, late := range map[string]bool{"unread before the answer": false, "under way at the reset": true} {
		t.Run(name, func(t *testing.T) {
			for range 10 {
				c := newChain(t)
				_, _ = io.WriteString(c.client, "\x03question")
				if _, err := io.ReadFull(c.server, make([]byte, 9)); err != nil {
					t.Fatal(err)
				}
				if !late {
					_, _ = io.WriteString(c.client, "close_notify")
					if _, err := peek(c.server); err != nil { // waits for it, and leaves it there
						t.Fatal(err)
					}
				}
				// In pieces, as a server's encoder writes a header.
				for piece := range slices.Chunk(answer, 1000) {
					_, _ = c.server.Write(piece)
				}
				if late {
					_, _ = io.WriteString(c.client, "close_notify")
					pipe.Abort(c.server)
				} else {
					_ = c.server.Close()
				}
				got, err := io.ReadAll(c.client)
				if !bytes.Equal(got, answer) || !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("read %d bytes of %d, %v, want all and a reset", len(got), len(answer), err)
				}
			}
		})
	}
}
