package procs

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

func TestPolicy(t *testing.T) {
	p := policy{n: 1}
	for i, c := range []struct {
		load
		looks int
		want  int
	}{
		{load{use: 0.9}, 100, 1}, // it suffices
		{load{use: 1}, 1, 1},
		{load{use: 0.9}, 1, 1},
		{load{use: 1}, 1, 1}, // not in a row
		{load{use: 1}, 1, 2},
		{load{use: 2}, 1, 2},
		{load{use: 2}, 1, 4},
		{load{use: 4}, 2, 5}, // there are no more
		{load{use: 5}, 20, 5},
		{load{use: 0.5}, calm - 1, 5},
		{load{use: 2.5}, 1, 5},
		{load{use: 0.5}, calm - 1, 5}, // not in a row
		{load{use: 0.5}, 1, 2},
		{load{use: 0.9}, 100, 2}, // where one would be full
		{load{use: 0.7}, calm, 1},
		{load{use: 0}, 10 * calm, 1},
		{load{use: 0.3, late: 1}, 100, 1}, // little waits for a processor, whoever has it
		{load{use: 0.5, late: 0.09}, 100, 1},
		{load{use: 0.5, late: 0.11}, busy, 2},
	} {
		for range c.looks {
			p.next(c.load, 1, 5)
		}
		if p.n != c.want {
			t.Fatalf("%d: %d processors after %d looks at %+v, want %d", i, p.n, c.looks, c.load, c.want)
		}
	}
	p = policy{n: 1}
	for range 2 * calm {
		if n := p.next(load{}, 3, 8); n != 3 {
			t.Fatalf("%d processors, want three at the least", n)
		}
	}
	for range calm { // and no longer than that
		p.next(load{}, 1, 8)
	}
	if p.n != 1 {
		t.Fatalf("%d processors, want one again", p.n)
	}
	if n := p.next(load{}, 3, 2); n != 2 {
		t.Fatalf("%d processors of two", n)
	}
}

// Follow does so with the real ones: more while there is work for more, and as many as
// there were when it ends.
func TestFollow(t *testing.T) {
	t.Setenv("GOMAXPROCS", "")
	all := runtime.GOMAXPROCS(0)
	if all == 1 {
		Follow(t.Context(), func() int { return 1 }) // returns: there is nothing to choose
		return
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan struct{})
	var least atomic.Int64
	least.Store(1)
	go func() { defer close(done); Follow(ctx, func() int { return int(least.Load()) }) }()
	await(t, 1)
	var idle atomic.Bool
	for range 2 * all {
		go func() {
			for n := 0; !idle.Load(); n++ {
				_ = n
			}
		}()
	}
	await(t, min(2, all))
	idle.Store(true)
	await(t, 1)
	least.Store(2) // without a load
	await(t, 2)
	stop()
	<-done
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("%d processors at the end, want %d", n, all)
	}
}

// await waits for a condition of this process, which tells nobody of it.
func await(t *testing.T, want int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	over := time.After(30 * time.Second)
	for runtime.GOMAXPROCS(0) != want {
		select {
		case <-tick.C:
		case <-over:
			t.Fatalf("%d processors, want %d", runtime.GOMAXPROCS(0), want)
		}
	}
}

// What the operator has said stays.
func TestEnvironment(t *testing.T) {
	t.Setenv("GOMAXPROCS", "7")
	before := runtime.GOMAXPROCS(0)
	Follow(t.Context(), func() int { return 1 }) // returns
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d processors, want %d", n, before)
	}
}
