package netlab

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func newLine() *line { return &line{random: rand.New(rand.NewPCG(1, 2))} }

// drain returns what arrives, in order.
func drain(l *line) (slots []int, dues []time.Duration) {
	for {
		due, ok := l.next()
		if !ok {
			return slots, dues
		}
		p := l.pop()
		if p.due != due {
			panic("next and pop disagree")
		}
		slots, dues = append(slots, int(p.slot)), append(dues, time.Duration(due))
	}
}

// enter lets packets of one size enter at one moment each, and returns how many
// met each fate.
func enter(l *line, w *Way, n, size int, at func(i int) time.Duration) map[fate]int {
	got := make(map[fate]int)
	for i := range n {
		due, f := l.admit(w, int64(at(i)), size)
		if f == arrives {
			l.push(due, i, size)
		}
		got[f]++
	}
	return got
}

func atOnce(int) time.Duration { return 0 }

func every(d time.Duration) func(int) time.Duration {
	return func(i int) time.Duration { return time.Duration(i) * d }
}

func TestLineDelays(t *testing.T) {
	l := newLine()
	enter(l, &Way{Delay: 30 * time.Millisecond}, 5, 100, every(time.Millisecond))
	slots, dues := drain(l)
	for i := range 5 {
		if want := 30*time.Millisecond + time.Duration(i)*time.Millisecond; slots[i] != i || dues[i] != want {
			t.Errorf("packet %d: slot %d at %v, want at %v", i, slots[i], dues[i], want)
		}
	}
}

// One Mbit/s is a packet of 1250 bytes each 10 ms, however many come at once; what
// waits is bounded in bytes, and what follows a pause does not profit from it.
func TestLineRateAndQueue(t *testing.T) {
	l := newLine()
	w := &Way{Rate: 1e6, Queue: 5000, Delay: time.Millisecond}
	if got := enter(l, w, 10, 1250, atOnce); got[arrives] != 4 || got[queueFull] != 6 {
		t.Errorf("of ten packets at once %v, want four that arrive", got)
	}
	_, dues := drain(l)
	for i, due := range dues {
		if want := time.Duration(i+1)*10*time.Millisecond + time.Millisecond; due != want {
			t.Errorf("packet %d arrives at %v, want %v", i, due, want)
		}
	}
	enter(l, w, 1, 1250, func(int) time.Duration { return time.Second })
	if _, dues := drain(l); dues[0] != 1011*time.Millisecond {
		t.Errorf("after a pause a packet arrives at %v, want 1.011 s", dues[0])
	}
	// Some packet must pass, however small the queue.
	if got := enter(newLine(), &Way{Rate: 1e6, Queue: 10}, 2, 1250, atOnce); got[arrives] != 1 {
		t.Errorf("of two packets and a queue of 10 bytes %v, want one that arrives", got)
	}
}

// Bytes that wait go on waiting at the new rate.
func TestLineChangesRate(t *testing.T) {
	l := newLine()
	slow := &Way{Rate: 1e6, Queue: 1 << 20}
	enter(l, slow, 10, 1250, atOnce) // 100 ms of the slow rate
	drain(l)
	fast := *slow
	fast.Rate = 1e7
	enter(l, &fast, 1, 1250, atOnce)
	if l.busy != int64(11*time.Millisecond) {
		t.Errorf("the rate is taken until %v, want 11 ms", time.Duration(l.busy))
	}
	// No limit, and a limit again: what waited is forgotten.
	enter(l, &Way{}, 1, 1250, atOnce)
	enter(l, slow, 1, 1250, func(int) time.Duration { return 20 * time.Millisecond })
	if l.busy != int64(30*time.Millisecond) {
		t.Errorf("the rate is taken until %v, want 30 ms", time.Duration(l.busy))
	}
}

func TestLineLoses(t *testing.T) {
	const n = 100000
	for _, share := range []float64{0, 0.02, 0.5, 1} {
		got := enter(newLine(), &Way{Loss: share}, n, 100, atOnce)
		if off := math.Abs(float64(got[lost]) - share*n); off > 0.05*share*n {
			t.Errorf("%d of %d packets are lost, want %v", got[lost], n, share*n)
		}
	}
}

// Jitter spreads evenly where packets are far from each other, and never puts
// one before another.
func TestLineJitters(t *testing.T) {
	l := newLine()
	const n = 10000
	enter(l, &Way{Delay: 20 * time.Millisecond, Jitter: 10 * time.Millisecond}, n, 100, every(10*time.Millisecond))
	slots, dues := drain(l)
	var sum time.Duration
	low, high := time.Hour, time.Duration(0)
	for i, due := range dues {
		if slots[i] != i {
			t.Fatalf("packet %d arrives as number %d", slots[i], i)
		}
		d := due - time.Duration(i)*10*time.Millisecond
		sum, low, high = sum+d, min(low, d), max(high, d)
	}
	if mean := sum / n; mean < 24*time.Millisecond || mean > 26*time.Millisecond || low < 20*time.Millisecond || high >= 30*time.Millisecond {
		t.Errorf("%v to %v, %v on average, want 20 ms to 30 ms and 25 ms", low, high, mean)
	}
	enter(l, &Way{Jitter: 10 * time.Millisecond}, n, 100, func(i int) time.Duration { return time.Hour + every(time.Microsecond)(i) })
	slots, _ = drain(l)
	for i := range slots {
		if slots[i] != i {
			t.Fatalf("packet %d arrives as number %d", slots[i], i)
		}
	}
}

func TestLineReorders(t *testing.T) {
	l := newLine()
	const n = 10000
	enter(l, &Way{Delay: time.Second, Reorder: 0.1, Behind: 3 * time.Millisecond}, n, 100, every(time.Millisecond))
	slots, dues := drain(l)
	late := 0
	for i, slot := range slots {
		switch d := dues[i] - time.Duration(slot)*time.Millisecond; d {
		case time.Second:
		case time.Second + 3*time.Millisecond:
			late++
		default:
			t.Fatalf("a packet took %v", d)
		}
	}
	if late < n/12 || late > n/8 {
		t.Errorf("%d of %d are held back, want a tenth", late, n)
	}
}

// A line in use, and the store beside it, allocate nothing.
func TestLineAllocatesNothing(t *testing.T) {
	l, s := newLine(), &store{}
	w := &Way{Delay: time.Millisecond, Jitter: time.Millisecond, Loss: 0.1, Rate: 1e9, Queue: 1 << 20, Reorder: 0.1, Behind: time.Millisecond}
	now := int64(0)
	carry := func() {
		for range 100 {
			slot, _ := s.take()
			now += 15000
			due, f := l.admit(w, now, 1500)
			if f != arrives {
				s.give(slot)
				continue
			}
			l.push(due, slot, 1500)
			for due, ok := l.next(); ok && due <= now; due, ok = l.next() {
				p := l.pop()
				s.give(int(p.slot))
			}
		}
	}
	for range 100 {
		carry()
	}
	if allocs := testing.AllocsPerRun(100, carry); allocs > 0 {
		t.Errorf("%v allocations for a hundred packets, want 0", allocs)
	}
}

// Slots are apart from each other, and there is an end of them.
func TestStoreIsBounded(t *testing.T) {
	var s store
	seen := make(map[*byte]bool)
	for i := range maxSlots {
		slot, ok := s.take()
		if !ok {
			t.Fatalf("the store is full with %d", i)
		}
		b := s.at(slot)
		if len(b) != slotSize || seen[&b[0]] {
			t.Fatalf("slot %d is of %d bytes, or used twice", slot, len(b))
		}
		seen[&b[0]] = true
	}
	if _, ok := s.take(); ok {
		t.Error("the store has no end")
	}
	s.give(77)
	if slot, ok := s.take(); !ok || slot != 77 {
		t.Errorf("after slot 77 was given back: %d, %v", slot, ok)
	}
}
