// Package procs has a process run on no more processors than its load needs.
//
//	go procs.Follow(ctx, func() int { return 1 })
//
// Go's scheduler wakes a thread for whatever becomes ready while a processor is idle,
// and that thread looks for work before it sleeps again. A process that hands on
// packets and never computes for long pays for that with each event. On one
// processor it does not, and what is ready waits no longer than the event before it
// takes.
package procs

import (
	"context"
	"os"
	"runtime"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookEvery is how often the load is looked at.
	lookEvery = 100 * time.Millisecond
	// full is the share of the processors' time in use at which there are to be more.
	// Where what was ready was late half is enough: others may use the processors too.
	// Either has to be so in busy looks in a row; then they double.
	full = 0.95
	half = 0.4
	busy = 2
	// late is how long what is ready may wait, and many how much of it may be late.
	late = 2 * time.Millisecond
	many = 0.1
	// low is the share of half of them below which half are to do, after calm looks
	// in a row. It leaves a gap to full, since more of them cost more.
	low  = 0.8
	calm = 30
)

// Follow sets GOMAXPROCS to what the load needs until ctx ends; then it is what it was.
// Ten times a second least tells how many there must be at the least. A GOMAXPROCS in
// the environment is the operator's choice, and stays. Follow is for one goroutine of a
// process.
func Follow(ctx context.Context, least func() int) {
	most := runtime.GOMAXPROCS(0)
	if os.Getenv("GOMAXPROCS") != "" || most == 1 {
		return
	}
	defer runtime.SetDefaultGOMAXPROCS()
	p, m := policy{n: min(least(), most)}, newMeter()
	runtime.GOMAXPROCS(p.n)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		before := p.n
		if n := p.next(m.look(), least(), most); n != before {
			runtime.GOMAXPROCS(n)
		}
	}
}

// A policy decides how many processors there are to be.
type policy struct {
	n    int
	high int // looks in a row at which they were not enough
	low  int // and at which half of them would have done
}

// next returns how many there are to be after a look: least at the least, and never
// more than most.
func (p *policy) next(l load, least, most int) int {
	n := float64(p.n)
	p.high = count(p.high, l.use > full*n || l.use > half*n && l.late > many)
	p.low = count(p.low, l.use < low*n/2)
	switch {
	case p.high >= busy:
		p.n, p.high, p.low = 2*p.n, 0, 0
	case p.low >= calm:
		p.n, p.low = p.n/2, 0
	}
	p.n = min(max(p.n, least, 1), most)
	return p.n
}

// count counts how often something is so in a row.
func count(n int, so bool) int {
	if so {
		return n + 1
	}
	return 0
}

// A load is what was seen since the look before.
type load struct {
	use  float64 // processors' worth of time
	late float64 // share of what was ready that waited for longer than late
}

// A meter looks at this process.
type meter struct {
	at         time.Time
	used       time.Duration
	sample     []metrics.Sample
	ready, old uint64 // what was ready, and what of it was late, since the start
}

func newMeter() *meter {
	m := &meter{sample: []metrics.Sample{{Name: "/sched/latencies:seconds"}}}
	m.look()
	return m
}

func (m *meter) look() load {
	before := *m
	m.at, m.used = time.Now(), usedTime()
	m.ready, m.old = m.waits()
	l := load{use: float64(m.used-before.used) / float64(m.at.Sub(before.at))}
	if n := m.ready - before.ready; n > 0 {
		l.late = float64(m.old-before.old) / float64(n)
	}
	return l
}

// waits counts how often a goroutine has waited for a processor, and for longer than
// late.
func (m *meter) waits() (all, old uint64) {
	metrics.Read(m.sample)
	if m.sample[0].Value.Kind() != metrics.KindFloat64Histogram {
		return 0, 0 // this Go does not tell
	}
	h := m.sample[0].Value.Float64Histogram()
	for i, n := range h.Counts {
		all += n
		if h.Buckets[i] >= late.Seconds() {
			old += n
		}
	}
	return all, old
}

// usedTime is the processors' time of this process.
func usedTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // not of this process
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
