package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/internal/testtcp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Real TCP on loopback: what the package promises is about half-closes and
// resets, which only it has.

var bob = catalog.Key{Datacenter: "dc2", Node: "bob"}

// within waits for f, which must not take long.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: not within 10 s", what)
	}
}

// reaching returns a DialPeer that has a connection already.
func reaching(far net.Conn) DialPeer {
	return func(context.Context, catalog.Key, Wanted) (Reached, error) { return Reached{Conn: far}, nil }
}

func TestOutboundRelays(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := NewMetrics(reg, "rpc")
	server, captured := testtcp.Pair(t)
	peer, far := testtcp.Pair(t)
	o := NewOutbound(func(_ context.Context, to catalog.Key, want Wanted) (Reached, error) {
		if to != bob || want != (Wanted{Service: "rpc", First: Untyped}) {
			t.Errorf("dialled %v %+v", to, want)
		}
		return Reached{Conn: far}, nil
	}, OutboundOptions{Metrics: m})
	done := make(chan struct{})
	go func() { defer close(done); o.Stream(t.Context(), bob, "rpc", captured) }()

	_, _ = io.WriteString(server, "question")
	_ = server.CloseWrite()
	if got, err := io.ReadAll(peer); err != nil || string(got) != "question" {
		t.Errorf("the peer read %q, %v", got, err)
	}
	if s := o.Peer(bob); s.Open != 1 || s.Total != 1 || s.BytesSent != 8 {
		t.Errorf("while it is open: %+v", s)
	}
	_, _ = io.WriteString(peer, "an answer")
	_ = peer.Close()
	if got, err := io.ReadAll(server); err != nil || string(got) != "an answer" {
		t.Errorf("the server read %q, %v", got, err)
	}
	within(t, "the end of Stream", func() { <-done })
	if got, want := o.Peer(bob), (PeerStats{Total: 1, BytesSent: 8, BytesReceived: 9}); got != want {
		t.Errorf("after its end: %+v, want %+v", got, want)
	}
	const want = `
# HELP culvert_stream_bytes_total Payload bytes of streams, from the local server (out) and to it (in), whoever dialled.
# TYPE culvert_stream_bytes_total counter
culvert_stream_bytes_total{direction="in",service="rpc"} 9
culvert_stream_bytes_total{direction="out",service="rpc"} 8
# HELP culvert_stream_connections_total Streams established, dialled by the local server (out) or by a peer (in).
# TYPE culvert_stream_connections_total counter
culvert_stream_connections_total{direction="in",service="rpc"} 0
culvert_stream_connections_total{direction="out",service="rpc"} 1
# HELP culvert_stream_failures_total Streams that could not be established: the peer was not reached or refused (out), the local server refused (in).
# TYPE culvert_stream_failures_total counter
culvert_stream_failures_total{direction="in"} 0
culvert_stream_failures_total{direction="out"} 0
# HELP culvert_stream_open Streams open now, dialled by the local server (out) or by a peer (in).
# TYPE culvert_stream_open gauge
culvert_stream_open{direction="in",service="rpc"} 0
culvert_stream_open{direction="out",service="rpc"} 0
# HELP culvert_stream_sessions_open Connections open now that carry streams of any number, begun by this sidecar (out) or by a peer's (in).
# TYPE culvert_stream_sessions_open gauge
culvert_stream_sessions_open{direction="in"} 0
culvert_stream_sessions_open{direction="out"} 0
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	o.Forget(bob)
	if got := o.Peer(bob); got != (PeerStats{}) {
		t.Errorf("after Forget: %+v", got)
	}
}

// Refused is refused: whoever asked sees a reset at once, and why is kept.
func TestOutboundWithoutAPeer(t *testing.T) {
	server, captured := testtcp.Pair(t)
	o := NewOutbound(func(context.Context, catalog.Key, Wanted) (Reached, error) {
		return Reached{}, errors.New("gateway away")
	}, OutboundOptions{})
	within(t, "Stream", func() { o.Stream(t.Context(), bob, "rpc", captured) })
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server read: %v, want a reset", err)
	}
	if s := o.Peer(bob); s.LastError != "gateway away" || s.Total != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestInboundWithoutAServer(t *testing.T) {
	peer, accepted := testtcp.Pair(t)
	i := NewInbound(func(context.Context, catalog.Key, string) (*net.TCPConn, error) {
		return nil, syscall.ECONNREFUSED
	}, InboundOptions{})
	within(t, "ServeConn", func() { i.ServeConn(t.Context(), bob, "rpc", Untyped, accepted) })
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer read: %v, want a reset", err)
	}
}

func TestInboundPassesAReset(t *testing.T) {
	peer, accepted := testtcp.Pair(t)
	server, dialled := testtcp.Pair(t)
	i := NewInbound(func(_ context.Context, from catalog.Key, service string) (*net.TCPConn, error) {
		if from != bob || service != "rpc" {
			t.Errorf("from %v for %s", from, service)
		}
		return dialled, nil
	}, InboundOptions{})
	done := make(chan struct{})
	go func() { defer close(done); i.ServeConn(t.Context(), bob, "rpc", Untyped, accepted) }()
	_, _ = io.WriteString(peer, "x")
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	pipe.Abort(server)
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer read: %v, want a reset", err)
	}
	within(t, "the end of ServeConn", func() { <-done })
	if s := i.Peer(bob); s.Total != 1 || s.Open != 0 || s.BytesReceived != 1 {
		t.Errorf("stats %+v", s)
	}
}

// Nothing ends an established stream but its ends, its context and a drain.
func TestContextAndDrainEndStreams(t *testing.T) {
	ends := map[string]func(o *Outbound, cancel func()){
		"context": func(_ *Outbound, cancel func()) { cancel() },
		"drain": func(o *Outbound, _ func()) {
			over, stop := context.WithCancel(context.Background())
			stop()
			if n := o.Drain(over); n != 1 {
				t.Errorf("Drain aborted %d, want 1", n)
			}
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			server, captured := testtcp.Pair(t)
			peer, far := testtcp.Pair(t)
			o := NewOutbound(reaching(far), OutboundOptions{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan struct{})
			go func() { defer close(done); o.Stream(ctx, bob, "rpc", captured) }()
			_, _ = io.WriteString(server, "x")
			if _, err := io.ReadFull(peer, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			end(o, cancel)
			for who, c := range map[string]net.Conn{"server": server, "peer": peer} {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the %s read: %v, want a reset", who, err)
				}
			}
			within(t, "the end of Stream", func() { <-done })
			if name != "drain" {
				return
			}
			near, late := testtcp.Pair(t)
			within(t, "a Stream after the drain", func() { o.Stream(t.Context(), bob, "rpc", late) })
			if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("after the drain: %v, want a reset", err)
			}
		})
	}
}
