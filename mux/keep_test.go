package mux

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/internal/memnet"
	"culvert/internal/pipe"
	"culvert/sniff"
)

// keeper is a handler that keeps each connection, and returns.
type keeper struct {
	lasting bool

	mu     sync.Mutex
	leaves []func()
	aborts int
}

func (k *keeper) pass(_ context.Context, c *sniff.Conn, p *Place) {
	raw, _ := c.Detach()
	if !p.Establish(k.lasting) {
		pipe.Abort(raw)
		return
	}
	p.Keep(func(leave func()) (abort func()) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.leaves = append(k.leaves, leave)
		return func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.aborts++
			pipe.Abort(raw)
			if k.aborts == 1 {
				go leave()
			}
		}
	})
}

func (k *keeper) aborted() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.aborts
}

// A connection that was kept has its place until it leaves, and is waited for.
func TestKeptConnectionsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		k := &keeper{}
		b := runBubble(t, ln, Options{Pass: k.pass, MaxConns: 1})
		c := dialMem(t, ln, "\x16")
		defer c.Close()
		synctest.Wait()
		if open := testutil.ToFloat64(b.m.open); open != 1 || len(b.slots) != 1 || b.ending.Len() != 1 {
			t.Errorf("%v open, %d slots taken, %d established, want one of each", open, len(b.slots), b.ending.Len())
		}
		time.AfterFunc(time.Second, k.leaves[0])
		b.wantStop(t, time.Second)
		if k.aborted() > 0 {
			t.Error("it was aborted")
		}
	})
}

// What does not end by itself is aborted as its handler wants: streams after the
// drain, lasting connections as soon as the others are gone.
func TestKeptConnectionsAreAborted(t *testing.T) {
	for _, lasting := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			ln := memnet.Listen()
			k := &keeper{lasting: lasting}
			b := runBubble(t, ln, Options{Pass: k.pass})
			c := dialMem(t, ln, "\x16")
			defer c.Close()
			after := DefaultDrainTimeout
			if lasting {
				after = 0
			}
			b.wantStop(t, after)
			if k.aborted() != 1 {
				t.Errorf("lasting %v: aborted %d times", lasting, k.aborted())
			}
		})
	}
}

// An end that comes while Keep is still being called is an end.
func TestKeptConnectionThatEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{Pass: func(_ context.Context, c *sniff.Conn, p *Place) {
			raw, _ := c.Detach()
			p.Establish(false)
			p.Keep(func(leave func()) (abort func()) {
				_ = raw.Close()
				leave()
				return func() { t.Error("aborted after its end") }
			})
		}})
		c := dialMem(t, ln, "\x16")
		defer c.Close()
		b.wantStop(t, 0)
	})
}

// A stop while a handler is about to keep a connection aborts it all the same, and
// only by the function that it gives.
func TestKeptAsTheDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		aborted := 0
		b := runBubble(t, ln, Options{Pass: func(_ context.Context, c *sniff.Conn, p *Place) {
			raw, _ := c.Detach()
			p.Establish(false)
			p.Keep(func(leave func()) (abort func()) {
				time.Sleep(DefaultDrainTimeout + time.Second)
				if err := raw.SetDeadline(time.Time{}); err != nil {
					t.Errorf("the server has closed it: %v", err)
				}
				return func() {
					aborted++
					pipe.Abort(raw)
					leave()
				}
			})
		}})
		c := dialMem(t, ln, "\x16")
		defer c.Close()
		b.wantStop(t, DefaultDrainTimeout+time.Second)
		if aborted != 1 {
			t.Errorf("aborted %d times", aborted)
		}
	})
}

// Workers that wait take what comes, and there are never many of them.
func TestWorkersAreUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		k := &keeper{}
		b := runBubble(t, ln, Options{Pass: k.pass})
		for range 3 * maxIdleWorkers {
			defer dialMem(t, ln, "\x16").Close()
		}
		synctest.Wait()
		if n := b.idle.Load(); n < 1 || n > maxIdleWorkers {
			t.Errorf("%d workers wait", n)
		}
		for _, leave := range k.leaves {
			leave()
		}
		b.wantStop(t, 0)
	})
}
