package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"culvert/catalog"
	"culvert/internal/memnet"
	"culvert/internal/pipe"
	"culvert/internal/testtcp"
)

// far is a peer's sidecar with a local server that echoes.
type far struct {
	in    *Inbound
	dials atomic.Int64 // of its local server
	down  atomic.Bool
	wg    sync.WaitGroup
}

func newFar(t *testing.T) *far {
	t.Helper()
	f := &far{}
	f.in = NewInbound(func(context.Context, catalog.Key, string) (*net.TCPConn, error) {
		f.dials.Add(1)
		if f.down.Load() {
			return nil, syscall.ECONNREFUSED
		}
		mine, server := testtcp.Pair(t)
		f.wg.Go(func() {
			_, _ = io.Copy(server, server)
			_ = server.Close()
		})
		return mine, nil
	}, InboundOptions{Datacenter: "dc2", Services: []string{"echo"}})
	return f
}

// aborted is a TCP connection that knows how to be aborted, as one with TLS does.
type aborted struct{ *net.TCPConn }

func (c aborted) Abort() { pipe.Abort(c.TCPConn) }

// dial connects to the far side; each dial is for a session where one is wanted.
func (f *far) dial(t *testing.T, dials *atomic.Int64) DialPeer {
	t.Helper()
	return func(_ context.Context, _ catalog.Key, want Wanted) (Reached, error) {
		dials.Add(1)
		near, accepted := testtcp.Pair(t)
		_ = near.SetDeadline(time.Time{})
		_ = accepted.SetDeadline(time.Time{})
		f.wg.Go(func() {
			if want.Session {
				f.in.ServeSession(t.Context(), alice, aborted{accepted})
				return
			}
			f.in.ServeConn(t.Context(), alice, want.Service, want.First, accepted)
		})
		return Reached{Conn: aborted{near}, Session: want.Session}, nil
	}
}

var alice = catalog.Key{Datacenter: "dc1", Node: "alice"}

// running returns an Outbound that keeps sessions until the test ends.
func running(t *testing.T, f *far, dial DialPeer, o OutboundOptions) *Outbound {
	t.Helper()
	out := NewOutbound(dial, o)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = out.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-done
		f.wg.Wait()
	})
	until(t, "Run", func() bool {
		out.carriers.mu.Lock()
		defer out.carriers.mu.Unlock()
		return out.carriers.ctx != nil
	})
	return out
}

// until waits for what real connections do, of which nobody is told.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	within(t, what, func() {
		for !done() {
			<-tick.C
		}
	})
}

// begin starts a stream of the local server, and returns the server's end.
func begin(t *testing.T, out *Outbound, service string) *net.TCPConn {
	t.Helper()
	server, captured := testtcp.Pair(t)
	done := make(chan struct{})
	go func() { defer close(done); out.Stream(t.Context(), bob, service, captured) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return server
}

func echo(t *testing.T, server *net.TCPConn) {
	t.Helper()
	want := bytes.Repeat([]byte("gossip"), 167)
	go func() {
		_, _ = server.Write(want)
		_ = server.CloseWrite()
	}()
	if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the server read %d bytes and %v, want %d", len(got), err, len(want))
	}
}

// Streams to one peer share a session, also those that come while it is dialled.
func TestStreamsShareASession(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { echo(t, begin(t, out, "echo")) })
	}
	within(t, "all streams", wg.Wait)
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials", n)
	}
	if s := out.Peer(bob); s.Total != 20 || s.BytesSent != 20*1002 || s.BytesReceived != 20*1002 {
		t.Errorf("stats %+v", s)
	}
	if n := out.Sessions(bob); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// A stream that is long has its session to itself from then on, and the next short
// one finds another, dialled before it comes.
func TestLongStreamsAreLeftAlone(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	long := begin(t, out, "echo")
	go func() { _, _ = long.Write(make([]byte, settledBytes)) }()
	if _, err := io.ReadFull(long, make([]byte, settledBytes)); err != nil {
		t.Fatal(err)
	}
	until(t, "a spare", func() bool { return out.Sessions(bob) >= 2 })
	before := dials.Load()
	echo(t, begin(t, out, "echo"))
	if n := dials.Load() - before; n != 0 {
		t.Errorf("%d dials for the short stream, want none", n)
	}
	_ = long.Close()
}

// A session is there before the first stream is, with peers that are not too many.
func TestPeersAreWarm(t *testing.T) {
	for name, c := range map[string]struct{ peers, sessions int }{"few": {3, 3}, "too many": {maxWarm + 1, 0}} {
		t.Run(name, func(t *testing.T) {
			var dials atomic.Int64
			f := newFar(t)
			peers := make([]catalog.Key, c.peers)
			for i := range peers {
				peers[i] = catalog.Key{Datacenter: "dc2", Node: fmt.Sprint("n", i)}
			}
			out := running(t, f, f.dial(t, &dials), OutboundOptions{Peers: func() []catalog.Key { return peers }})
			until(t, "the sessions", func() bool { return out.Sessions(peers[0]) > 0 == (c.sessions > 0) })
			until(t, "the dials", func() bool { return int(dials.Load()) >= c.sessions })
			if n := dials.Load(); int(n) != c.sessions {
				t.Errorf("%d dials, want %d", n, c.sessions)
			}
		})
	}
}

// refusing is what a native server says to who wants nothing but a session.
type noProtocol struct{}

func (noProtocol) Error() string  { return "no application protocol" }
func (noProtocol) Answered() bool { return true }

// A peer that has no sessions is asked for one once, and not each second.
func TestNoSessionIsNotAskedForAgain(t *testing.T) {
	var dials atomic.Int64
	out := NewOutbound(func(context.Context, catalog.Key, Wanted) (Reached, error) {
		dials.Add(1)
		return Reached{}, noProtocol{}
	}, OutboundOptions{Peers: func() []catalog.Key { return []catalog.Key{bob} }})
	cs := out.carriers
	cs.ctx = t.Context()
	for i := range 100 {
		cs.look(t.Context(), time.Now().Add(time.Duration(i)*time.Minute))
		cs.wg.Wait()
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials, want 1", n)
	}
}

// Streams that are known to be long have connections of their own from the start.
func TestStreamsAlone(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{Alone: func(service string, _ Type) bool { return service == "echo" }})
	echo(t, begin(t, out, "echo"))
	echo(t, begin(t, out, "echo"))
	if n := dials.Load(); n != 2 || out.Sessions(bob) != 0 {
		t.Errorf("%d dials, %d sessions", n, out.Sessions(bob))
	}
}

// A peer without sessions is asked for one each time, as it may be another by then,
// and gets a connection for each stream; nobody waits for another's dial.
func TestPeerWithoutSessions(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	dial := f.dial(t, &dials)
	out := running(t, f, func(ctx context.Context, to catalog.Key, want Wanted) (Reached, error) {
		want.Session = false
		return dial(ctx, to, want)
	}, OutboundOptions{})
	for range 3 {
		echo(t, begin(t, out, "echo"))
	}
	if n := dials.Load(); n != 3 || out.Sessions(bob) != 0 {
		t.Errorf("%d dials, %d sessions", n, out.Sessions(bob))
	}
}

// Refused is refused, on a session too: a reset at once, with the reason kept, and
// the session lives on.
func TestRefusedOnASession(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	f.down.Store(true)
	wantReset(t, begin(t, out, "echo"))
	until(t, "the reason", func() bool { return strings.Contains(out.Peer(bob).LastError, "local server does not take") })
	f.down.Store(false)
	wantReset(t, begin(t, out, "nothing"))
	until(t, "the reason", func() bool { return strings.Contains(out.Peer(bob).LastError, "no such service") })
	echo(t, begin(t, out, "echo"))
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials", n)
	}
}

// A reset crosses a session as one, both ways.
func TestResetsCrossSessions(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	server := begin(t, out, "echo")
	_, _ = io.WriteString(server, "x")
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	pipe.Abort(server)
	until(t, "the stream's end on both sides", func() bool { return out.Peer(bob).Open+f.in.Peer(alice).Open == 0 })
	echo(t, begin(t, out, "echo"))
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials", n)
	}
}

// A drain takes no more streams, waits for those that are open, and leaves no
// session; the next stream is dialled anew.
func TestDrainOfSessions(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	server := begin(t, out, "echo")
	_, _ = io.WriteString(server, "x")
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	drained := make(chan struct{})
	go func() { defer close(drained); f.in.Drain(t.Context()) }()
	echoed := make(chan struct{})
	go func() { defer close(echoed); echo(t, server) }()
	within(t, "the drain", func() { <-echoed; <-drained })
	until(t, "the session's end", func() bool { return out.Sessions(bob) == 0 })
}

// A peer that left keeps its streams to their end, and no session.
func TestForgetEndsSessions(t *testing.T) {
	var dials atomic.Int64
	f := newFar(t)
	out := running(t, f, f.dial(t, &dials), OutboundOptions{})
	server := begin(t, out, "echo")
	_, _ = io.WriteString(server, "x")
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	out.Forget(bob)
	echo(t, server)
	until(t, "the session's end", func() bool { return out.Sessions(bob) == 0 })
}

// One peer cannot fill the sidecar with sessions.
func TestSessionsOfAPeerAreBounded(t *testing.T) {
	f := newFar(t)
	var dials atomic.Int64
	dial := f.dial(t, &dials)
	for range maxPeerSessions {
		r, err := dial(t.Context(), bob, Wanted{Session: true})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
	}
	until(t, "the sessions", func() bool {
		f.in.sessions.mu.Lock()
		defer f.in.sessions.mu.Unlock()
		return len(f.in.sessions.open) == maxPeerSessions
	})
	r, err := dial(t.Context(), bob, Wanted{Session: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, r.Conn); err != nil {
		t.Errorf("one session too many: %v, want its end", err)
	}
	_ = r.Close()
	f.in.Drain(t.Context())
	f.wg.Wait()
}

// What a path swallows shows in time: a session whose peer is silent gets no more
// streams, and ends if the peer stays so. yamux keeps its timers in a pool of the
// process, which no bubble may share: the clock is moved by hand instead.
func TestSilentSession(t *testing.T) {
	f := newFar(t)
	var dials atomic.Int64
	var first *memnet.Conn
	dial := func(context.Context, catalog.Key, Wanted) (Reached, error) {
		near, accepted := memnet.Pipe()
		if dials.Add(1) == 1 {
			first = accepted
		}
		f.wg.Go(func() { f.in.ServeSession(t.Context(), alice, accepted) })
		return Reached{Conn: near, Session: true}, nil
	}
	out := NewOutbound(dial, OutboundOptions{})
	cs := out.carriers
	cs.ctx, cs.timeout = t.Context(), time.Second
	defer func() {
		over, stop := context.WithCancel(t.Context())
		stop()
		cs.run(over) // ends what is left
		f.wg.Wait()
	}()
	ask := func() {
		t.Helper()
		r, err := cs.reach(t.Context(), bob, Wanted{Service: "nothing", First: Untyped})
		if err != nil {
			t.Fatal(err)
		}
		var no refused
		if _, err := r.Read(make([]byte, 1)); !errors.As(err, &no) {
			t.Errorf("a stream to no service: %v", err)
		}
		pipe.Abort(r.Conn)
	}
	look := func(c *carrier, in time.Duration) (pinged time.Time, free bool) {
		now := time.Now().Add(in)
		cs.look(t.Context(), now)
		cs.mu.Lock()
		defer cs.mu.Unlock()
		return c.pinged, c.free(now)
	}
	ask()
	cs.mu.Lock()
	c := cs.pools[bob].all[0]
	cs.mu.Unlock()
	if pinged, free := look(c, pingAfter/2); !pinged.IsZero() || !free {
		t.Errorf("after a while: pinged %v, free %v", pinged, free)
	}
	if pinged, free := look(c, pingAfter+time.Second); pinged.IsZero() || !free {
		t.Errorf("after a long while: pinged %v, free %v", pinged, free)
	}
	until(t, "the answer", func() bool { cs.mu.Lock(); defer cs.mu.Unlock(); return c.pinged.IsZero() })

	first.Block() // what the peer answers arrives no more
	if pinged, free := look(c, pingAfter+time.Second); pinged.IsZero() || !free {
		t.Errorf("in the silence: pinged %v, free %v", pinged, free)
	}
	if _, free := look(c, pingAfter+doubtAfter+2*time.Second); free {
		t.Error("a session whose peer does not answer is free")
	}
	until(t, "its end", func() bool {
		select {
		case <-c.Done():
			return true
		default:
			return false
		}
	})
	first.Unblock()
	ask()
	if n := dials.Load(); n != 2 {
		t.Errorf("%d dials, want 2", n)
	}
	later := time.Now()
	until(t, "what is not wanted for long ends", func() bool {
		later = later.Add(keptFor + time.Minute) // from what the last look may have taken for use
		cs.look(t.Context(), later)
		return out.Sessions(bob) == 0
	})
}
