package heap

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestShare(t *testing.T) {
	for i, c := range []struct {
		usage
		want int
	}{
		{usage{4 << 20, 4 << 20}, 100},
		{usage{4 << 20, 5 << 20}, 80},
		{usage{8 << 20, 10 << 20}, 40},
		{usage{1 << 30, 1 << 30}, 0},
		{usage{1 << 20, 1 << 20}, 125}, // 5 MiB: at 400 per cent it would be collected at 16
		{usage{}, 100},
	} {
		if got := c.share(); got != c.want {
			t.Errorf("%d: %d per cent for %+v, want %d", i, got, c.usage, c.want)
		}
	}
}

func TestPacer(t *testing.T) {
	now := time.Now()
	p := pacer{least: 50, percent: 50}
	for i, c := range []struct {
		after time.Duration
		live  uint64
		want  int
	}{
		{0, 4 << 20, 50}, // the first
		{often, 4 << 20, 50},
		{often - 1, 4 << 20, 100},
		{time.Hour, 4 << 20, 100},
		{1, 4 << 20 * 9 / 10, 100}, // not by little
		{1, 5 << 20, 100},
		{1, 3 << 20, 133},
		{time.Hour, 5 << 20, 80}, // as soon as more is alive
		{1, 7 << 20, 57},
		{1, 100 << 20, 50},
		{1, 7 << 20, 50},
		{1, 6 << 20, 66},
		{1, 8 << 20, 50},
	} {
		now = now.Add(c.after)
		p.collected(now, usage{c.live, c.live})
		if p.percent != c.want {
			t.Fatalf("%d: %d per cent after %+v, want %d", i, p.percent, c, c.want)
		}
	}
	p.percent = 100
	made := uint64(100 << 20)
	for i, c := range []struct {
		more uint64
		want bool
	}{{0, false}, {0, false}, {little, false}, {0, false}, {0, false}, {little - 1, true}, {0, false}} {
		made += c.more
		if calm := p.calm(made); calm != c.want || p.percent != map[bool]int{false: 100, true: 50}[i >= 5] {
			t.Errorf("%d: calm %v, %d per cent", i, calm, p.percent)
		}
	}
	p.collected(now.Add(1), usage{4 << 20, 4 << 20}) // by whom it was calm
	if p.percent != 50 {
		t.Errorf("%d per cent", p.percent)
	}
}

// The real ones: more while there is much garbage, and no garbage afterwards; at last
// what there was.
func TestPace(t *testing.T) {
	t.Setenv("GOGC", "")
	before := percent()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan struct{})
	go func() { defer close(done); Pace(ctx, 50) }()
	for range 2 {
		await(t, "50 per cent", func() bool { return percent() == 50 })
		forced := read("/gc/cycles/forced:gc-cycles")
		var kept []byte
		await(t, "more", func() bool {
			for range 100 {
				kept = make([]byte, 32<<10)
			}
			return percent() > 50
		})
		runtime.KeepAlive(kept)
		if goal, live := read("/gc/heap/goal:bytes"), read("/gc/heap/live:bytes"); goal > live+2*spare {
			t.Errorf("of %d bytes alive it may grow to %d", live, goal)
		}
		await(t, "a collection for nothing else", func() bool { return read("/gc/cycles/forced:gc-cycles") > forced })
		<-time.After(2 * quiet * look)
		if n := read("/gc/cycles/forced:gc-cycles"); n != forced+1 {
			t.Errorf("%d collections for nothing else, want one", n-forced)
		}
	}
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
			t.Fatalf("%d per cent; waited for %s", percent(), what)
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
