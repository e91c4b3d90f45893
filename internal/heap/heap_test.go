package heap

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestPacer(t *testing.T) {
	now := time.Now()
	p := pacer{least: 50, percent: 50}
	for i, c := range []struct {
		after time.Duration
		live  uint64
		want  int
	}{
		{0, 1 << 20, 50}, // the first
		{often, 1 << 20, 50},
		{often - 1, 1 << 20, 400},
		{time.Hour, 1 << 20, 400},
		{1, 1 << 20 * 4 / 5, 400}, // not by little
		{1, 1, most},
		{time.Hour, 2 << 20, 200}, // as soon as more is alive
		{1, 7 << 20, 57},
		{1, 8 << 20, 57},
		{1, 100 << 20, 57},
		{1, 6 << 20, 57},
		{1, 4 << 20, 100},
		{1, 100 << 20, 50},
		{1, 7 << 20, 50},
		{1, 6 << 20, 66},
	} {
		now = now.Add(c.after)
		p.collected(now, c.live)
		if p.percent != c.want {
			t.Fatalf("%d: %d per cent after %+v, want %d", i, p.percent, c, c.want)
		}
	}
	for i, c := range []struct {
		made uint64
		want bool
	}{{5 << 20, false}, {6 << 20, false}, {7<<20 - 1, true}} {
		if calm := p.calm(c.made); calm != c.want || calm != (p.percent == 50) {
			t.Errorf("%d: calm %v, %d per cent", i, calm, p.percent)
		}
	}
}

// The real ones: more while there is much garbage, and what there was when it ends.
func TestPace(t *testing.T) {
	t.Setenv("GOGC", "")
	before := percent()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan struct{})
	go func() { defer close(done); Pace(ctx, 50) }()
	for range 2 {
		await(t, "50", func() bool { return percent() == 50 })
		var kept []byte
		await(t, "more", func() bool {
			for range 100 {
				kept = make([]byte, 32<<10)
			}
			return percent() > 50
		})
		runtime.KeepAlive(kept)
	}
	await(t, "50 again", func() bool { return percent() == 50 })
	stop()
	<-done
	if n := percent(); n != before {
		t.Errorf("%d per cent at the end, want %d", n, before)
	}
}

func percent() uint64 { return read("/gc/gogc:percent") }

// await waits for a condition of this process, which tells nobody of it.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	over := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-over:
			t.Fatalf("%d per cent, want %s", percent(), what)
		}
	}
}

// What the operator has said stays.
func TestEnvironment(t *testing.T) {
	t.Setenv("GOGC", "77")
	before := percent()
	Pace(t.Context(), 50) // returns
	if n := percent(); n != before {
		t.Errorf("%d per cent, want %d", n, before)
	}
}
