package packet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"culvert/catalog"
)

func alice() catalog.Key { return catalog.Key{Datacenter: "dc1", Node: "alice"} }

// A node is one of the two sides of a link.
type node struct {
	*Link
	recv  *Receiver
	other *node
	ctx   context.Context // of what it serves
	stop  func()

	mu    sync.Mutex
	got   []string
	dials []time.Time
	conns []*testConn   // that it has dialled
	fail  bool          // dials end in an error
	delay time.Duration // of a dial
}

func (n *node) deliver(packets [][]byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range packets {
		n.got = append(n.got, string(p))
	}
	return len(packets), nil
}

func (n *node) received() []string {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.got)
}

func (n *node) dialled() []*testConn {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.conns)
}

// live is how many of the connections that it has dialled have not ended.
func (n *node) live() (count int) {
	for _, c := range n.dialled() {
		if ended(c) == nil && ended(&testConn{in: c.out}) == nil {
			count++
		}
	}
	return count
}

// duo makes the links of alice and bob, who serve what the other dials. They are not started.
func duo(t *testing.T) (a, b *node) {
	t.Helper()
	a, b = &node{recv: NewReceiver(ReceiverOptions{})}, &node{recv: NewReceiver(ReceiverOptions{})}
	a.other, b.other = b, a
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for n, keys := range map[*node][2]catalog.Key{a: {alice(), bob()}, b: {bob(), alice()}} {
		n.ctx = ctx
		n.Link = NewLink(func(ctx context.Context) (Conn, error) { return n.call(ctx, &wg) }, LinkOptions{
			Self: keys[0], Peer: keys[1], Deliver: n.deliver, Receiver: n.recv, Pulse: NewPulse(),
		})
		wg.Go(func() { _ = n.o.Pulse.Run(ctx) })
		n.stop = sync.OnceFunc(n.Stop)
	}
	t.Cleanup(func() {
		a.stop()
		b.stop()
		cancel()
		wg.Wait()
	})
	return a, b
}

// call dials the other side.
func (n *node) call(ctx context.Context, wg *sync.WaitGroup) (Conn, error) {
	n.mu.Lock()
	n.dials = append(n.dials, time.Now())
	fail, delay := n.fail, n.delay
	n.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail {
		return nil, errDial
	}
	near, far := testPair(true)
	n.mu.Lock()
	n.conns = append(n.conns, near)
	n.mu.Unlock()
	wg.Go(func() { _ = n.other.recv.Serve(n.other.ctx, far, n.o.Self, n.other.Link, n.other.deliver) })
	return near, nil
}

func (n *node) start(t *testing.T) { n.Start(t.Context()) }

func (n *node) wantState(t *testing.T, want string) {
	t.Helper()
	synctest.Wait()
	if st := n.Status(); st.State != want {
		t.Fatalf("state %q of %s's link, want %q (last error %q)", st.State, n.o.Self.Node, want, st.LastError)
	}
}

func TestTwoWay(t *testing.T) {
	inBubble(t, "on one connection", func(t *testing.T) {
		a, b := duo(t)
		a.start(t)
		b.fail = true // only one of them can dial
		a.Send([]byte("question"), false)
		if got := fmt.Sprint(b.received()); got != "[question]" {
			t.Fatalf("bob got %s", got)
		}
		b.start(t)
		b.Send([]byte("to nobody yet"), false) // his link runs since the offer came
		synctest.Wait()
		a.Kick()
		after(time.Second)
		b.Send([]byte("answer"), false)
		if got := a.received(); len(got) == 0 || got[len(got)-1] != "answer" {
			t.Fatalf("alice got %q", got)
		}
		b.wantState(t, stateUp)
		if st := b.Status(); st.PacketsSent != uint64(len(a.received())) {
			t.Fatalf("status %+v", st)
		}
		if got := a.recv.Received(bob()); got.Packets != uint64(len(a.received())) {
			t.Fatalf("received %+v", got)
		}
	})
	inBubble(t, "the offer goes first, with the packets", func(t *testing.T) {
		a, _ := duo(t)
		a.delay = time.Millisecond
		a.start(t)
		a.Send([]byte("hello"), false)
		after(2 * time.Millisecond)
		if got := a.dialled()[0].recorded(); len(got) != 1 || !bytes.Equal(got[0], AppendFrame(AppendFrame(nil, nil), []byte("hello"))) {
			t.Fatalf("alice wrote % x", got)
		}
	})
}

// Peers of before know nothing of offers: each direction has a connection of its own, dialled for packets.
func TestTwoWayWithPeersOfBefore(t *testing.T) {
	inBubble(t, "an acceptor", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{Deliver: func(packets [][]byte) (int, error) { return len(packets), nil }})
		after(defaultSpread)
		far := b.peer(t)
		after(30 * time.Second)
		b.wantState(t, stateUp)
		after(defaultIdleTimeout - 32*time.Second)
		b.wantState(t, stateUp)
		after(3 * time.Second)
		b.wantState(t, stateIdle)
		wantFrames(t, far, "") // the offer, and no keepalive
		after(10 * time.Minute)
		if n := b.dials.Load(); n != 1 {
			t.Fatalf("%d dials, though nobody sends anything", n)
		}
		b.Send([]byte("x"), false)
		wantFrames(t, b.peer(t), "", "x")
	})
	inBubble(t, "a dialler", func(t *testing.T) {
		_, b := duo(t)
		b.start(t)
		b.fail = true
		s := serveLink(t, b)
		s.write(t, AppendFrame(nil, []byte("1")))
		s.write(t, AppendFrame(AppendFrame(nil, nil), []byte("2"))) // too late for an offer
		b.Send([]byte("x"), false)
		after(2 * keepaliveAfter)
		wantFrames(t, s.far, "") // the answer
		if got := fmt.Sprint(b.received()); got != "[1 2]" {
			t.Fatalf("bob got %s", got)
		}
	})
	inBubble(t, "native", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{Deliver: func(packets [][]byte) (int, error) { return len(packets), nil }})
		after(defaultSpread)
		far := b.peer(t)
		after(defaultIdleTimeout + 3*time.Second)
		b.wantState(t, stateIdle)
		wantFrames(t, far)
		after(10 * time.Minute)
		if n := b.dials.Load(); n != 1 {
			t.Fatalf("%d dials", n)
		}
	})
}

// serveLink is what a node does with a connection of the test's.
func serveLink(t *testing.T, n *node) *serving {
	far, near := testPair(true)
	ctx, cancel := context.WithCancel(t.Context())
	s := &serving{far: far, done: make(chan struct{}), stop: cancel}
	t.Cleanup(func() {
		cancel()
		_ = far.Close()
		<-s.done
	})
	go func() {
		defer close(s.done)
		s.err = n.recv.Serve(ctx, near, n.o.Peer, n.Link, n.deliver)
	}()
	synctest.Wait()
	return s
}

// TestTieBreak: where both have dialled, what the lower one has dialled stays, and no packet is lost.
func TestTieBreak(t *testing.T) {
	for _, delays := range [][2]time.Duration{{0, 0}, {0, 5}, {5, 0}, {40, 5}, {5, 40}} {
		inBubble(t, fmt.Sprint(delays), func(t *testing.T) {
			a, b := duo(t)
			a.delay, b.delay = delays[0]*time.Millisecond, delays[1]*time.Millisecond
			a.start(t)
			b.start(t)
			var want []string
			for i := range 100 { // both dial at once, as both have something to send
				want = append(want, fmt.Sprint(i))
				a.Send(fmt.Append(nil, i), false)
				b.Send(fmt.Append(nil, i), false)
				after(time.Millisecond)
			}
			after(retireTimeout)
			for _, n := range []*node{a, b} {
				got := n.received()
				slices.SortFunc(got, func(x, y string) int { return len(x)*100 - len(y)*100 + strings.Compare(x, y) })
				if !slices.Equal(got, want) {
					t.Errorf("%s got %d packets of %d: %q", n.o.Self.Node, len(got), len(want), got)
				}
				n.wantState(t, stateUp)
				if st := n.Status(); len(st.Drops) > 0 || st.LastError != "" {
					t.Errorf("%s: %+v", n.o.Self.Node, st)
				}
			}
			offered := slices.ContainsFunc(a.dialled(), func(c *testConn) bool { return len(c.recorded()) > 0 })
			if x, y := a.live(), b.live(); x+y != 1 || offered && x == 0 {
				t.Errorf("%d connections that alice dialled stay, and %d of bob's", x, y)
			}
		})
	}
	inBubble(t, "the higher one has given up what the lower one keeps", func(t *testing.T) {
		a, b := duo(t)
		a.start(t)
		a.Send([]byte("1"), false)
		synctest.Wait()
		b.start(t)
		a.Kick()
		after(time.Second)
		b.wantState(t, stateUp)
		// For bob alice's connection is over; she does not know.
		b.mu.Lock()
		b.Link.mu.Lock()
		for _, s := range b.sessions {
			s.c = &deafConn{testConn: s.c.(*testConn)}
			s.l.leave(s)
		}
		b.ending = 0
		b.Link.mu.Unlock()
		b.mu.Unlock()
		b.Send([]byte("2"), false)
		after(time.Second)
		if got := a.received(); len(got) == 0 || got[len(got)-1] != "2" {
			t.Fatalf("alice got %q", got)
		}
		a.Send([]byte("3"), false)
		if got := b.received(); got[len(got)-1] != "3" {
			t.Fatalf("bob got %q: what goes to a connection that is over for him is lost", got)
		}
		if n := b.live(); n != 1 {
			t.Fatalf("%d connections of bob's stay", n)
		}
	})
}

// deafConn is a connection whose end does not reach the other side.
type deafConn struct{ *testConn }

func (*deafConn) Abort()       {}
func (*deafConn) Close() error { return nil }

func TestKeepalive(t *testing.T) {
	inBubble(t, "both sides", func(t *testing.T) {
		a, b := duo(t)
		a.start(t)
		b.start(t)
		after(10 * time.Minute)
		if n := len(a.dialled()) + len(b.dialled()); n != 1 {
			t.Fatalf("%d connections in ten minutes of silence", n)
		}
		near := append(a.dialled(), b.dialled()...)[0]
		// The offer; and from then on one frame for each silence.
		if n := len(near.recorded()); n < 1+600/18 || n > 1+600/13 {
			t.Fatalf("%d writes in ten minutes", n)
		}
		a.wantState(t, stateUp)
		b.wantState(t, stateUp)
		if st := a.Status(); st.PacketsSent != 0 || st.LastError != "" {
			t.Fatalf("status %+v", st)
		}
	})
	inBubble(t, "none beside packets", func(t *testing.T) {
		a, b := duo(t)
		b.fail = true
		a.start(t)
		b.start(t)
		after(defaultSpread)
		near := a.dialled()[0]
		before := len(near.recorded())
		for range 60 {
			a.Send([]byte("x"), false)
			after(time.Second)
		}
		if n := len(near.recorded()) - before; n != 60 {
			t.Fatalf("%d writes for 60 packets", n)
		}
	})
	inBubble(t, "dead", func(t *testing.T) {
		a, b := duo(t)
		b.fail = true
		a.start(t)
		b.start(t)
		after(defaultSpread)
		a.dialled()[0].swallow() // nothing of hers arrives any more
		after(deadAfter + 3*time.Second)
		if got := ended(a.dialled()[0]); !errors.Is(got, syscall.ECONNRESET) {
			t.Fatalf("bob keeps a connection on which nothing arrives: %v", got)
		}
		if st := b.Status(); st.LastError != errDead.Error() {
			t.Fatalf("last error %q", st.LastError)
		}
		after(shortestQuiet)
		a.wantState(t, stateUp) // she has dialled again
		b.wantState(t, stateUp)
		if n := len(a.dialled()); n != 2 {
			t.Fatalf("%d connections", n)
		}
	})
}

// Of several connections that there are for a moment each lives and dies by itself.
func TestKeepaliveOfSeveral(t *testing.T) {
	inBubble(t, "the first one is dead", func(t *testing.T) {
		a, b := duo(t)
		a.start(t)
		b.start(t)
		after(time.Minute)
		b.Link.mu.Lock()
		s := b.sessions[0]
		b.leave(s) // for bob that connection is over, and he dials another
		b.ending = 0
		s.ending = false
		b.Link.mu.Unlock()
		a.dialled()[0].in.update(func() { a.dialled()[0].in.blocked = true }) // of which alice hears nothing
		b.Send([]byte("1"), false)
		synctest.Wait()
		a.Link.mu.Lock()
		n := len(a.sessions)
		a.Link.mu.Unlock()
		if n != 2 {
			t.Fatalf("alice has %d connections, want both", n)
		}
		after(deadAfter + 20*time.Second)
		a.Link.mu.Lock()
		n = len(a.sessions)
		a.Link.mu.Unlock()
		if n != 1 {
			t.Fatalf("alice has %d connections, want the one that lives", n)
		}
		a.Send([]byte("2"), false)
		if got := b.received(); len(got) == 0 || got[len(got)-1] != "2" {
			t.Fatalf("bob got %q", got)
		}
	})
}

func TestWarm(t *testing.T) {
	inBubble(t, "backs off while nobody sends", func(t *testing.T) {
		a, _ := duo(t)
		a.fail = true
		a.start(t)
		after(10 * time.Minute)
		a.wantState(t, stateDown)
		if first := time.Since(a.dials[0]); first < 10*time.Minute-defaultSpread {
			t.Errorf("the first dial came after %v", 10*time.Minute-first)
		}
		for i := 9; i < len(a.dials); i++ {
			if gap := a.dials[i].Sub(a.dials[i-1]); gap < longestQuiet/2 || gap > longestQuiet {
				t.Errorf("pause %d is %v", i, gap)
			}
		}
		if n := len(a.dials); n < 10 || n > 25 {
			t.Fatalf("%d dials in ten minutes", n)
		}
		// A packet does not wait for that.
		before := len(a.dials)
		a.mu.Lock()
		a.fail = false
		a.mu.Unlock()
		a.Send([]byte("x"), false)
		after(longestBackoff)
		a.wantState(t, stateUp)
		if n := len(a.dials) - before; n != 1 {
			t.Fatalf("%d dials", n)
		}
	})
	inBubble(t, "is up again soon", func(t *testing.T) {
		a, b := duo(t)
		a.start(t)
		b.start(t)
		after(time.Minute)
		for range 5 {
			for _, c := range append(a.dialled(), b.dialled()...) {
				c.Abort()
			}
			after(2 * time.Second)
			a.wantState(t, stateUp)
			b.wantState(t, stateUp)
			after(time.Minute)
		}
		if n := len(b.dialled()); n > 1 {
			t.Errorf("the higher one has dialled %d times where the lower one does", n)
		}
	})
}

// TestTwoWayStopCostsNoPacket: what was written before a planned stop is delivered, whichever side had dialled.
func TestTwoWayStopCostsNoPacket(t *testing.T) {
	for _, dialler := range []bool{true, false} {
		inBubble(t, fmt.Sprint("of the dialler ", dialler), func(t *testing.T) {
			a, b := duo(t)
			b.fail = true
			a.start(t)
			b.start(t)
			after(defaultSpread)
			stays, stops := b, a
			if !dialler {
				stays, stops = a, b
			}
			near := a.dialled()[0]
			near.block()
			a.Send([]byte("a"), false)
			b.Send([]byte("b"), false)
			if stops == a {
				near.unblock() // a stuck write does not hold up a stop
				synctest.Wait()
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				stops.stop()
			}()
			synctest.Wait()
			near.unblock()
			stays.Send([]byte("after the end was read"), false)
			<-done
			synctest.Wait()
			if got := fmt.Sprint(a.received(), b.received()); !strings.HasPrefix(got, "[b") || !strings.Contains(got, "] [a") {
				t.Fatalf("delivered %s", got)
			}
			stays.Link.mu.Lock()
			defer stays.Link.mu.Unlock()
			if len(stays.sessions) > 0 {
				t.Error("a connection that has ended is kept")
			}
		})
	}
}
