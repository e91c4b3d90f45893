// Package heap has a process collect its garbage less often while it makes much of it.
//
//	go heap.Pace(ctx, 50)
//
// Go collects whenever the heap has grown by a share of what is alive in it. Where that
// is little, a few megabytes, a storm of handshakes is collected sixty times a second,
// and each time empties the pools of buffers too. A larger share for good would have a
// process that does nothing keep the garbage of its start.
package heap

import (
	"context"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// often is how soon after the one before a collection shows that much is made.
	often = 200 * time.Millisecond
	// spare is what the heap may grow by then, in bytes, and most the largest share, in
	// per cent.
	spare = 4 << 20
	most  = 1000
	// little is how much is made in a time in which the heap is to be small again, in
	// bytes.
	little = 1 << 20
	look   = 250 * time.Millisecond
)

// Pace sets GOGC to least until ctx ends, or to as much more as lets the heap grow by 4
// MiB, while without that it would be collected several times a second. Then it is what it
// was. A GOGC in the environment is the operator's choice, and stays. Pace is for one
// goroutine of a process.
func Pace(ctx context.Context, least int) {
	if os.Getenv("GOGC") != "" {
		return
	}
	defer debug.SetGCPercent(debug.SetGCPercent(least))
	p := pacer{least: least, percent: least}
	collected := make(chan struct{}, 1)
	watch(ctx, collected)
	tick := time.NewTicker(look)
	tick.Stop()
	for {
		before := p.percent
		select {
		case <-ctx.Done():
			return
		case <-collected:
			p.collected(time.Now(), read("/gc/heap/live:bytes"))
			if p.percent > before {
				tick.Reset(look)
			}
		case <-tick.C:
			if !p.calm(read("/gc/heap/allocs:bytes")) {
				continue
			}
			tick.Stop()
			debug.SetGCPercent(least)
			debug.FreeOSMemory() // by a collection, for which there may be no other reason for long
			continue
		}
		if p.percent != before {
			debug.SetGCPercent(p.percent)
		}
	}
}

// watch tells of each collection until ctx ends.
func watch(ctx context.Context, collected chan<- struct{}) {
	runtime.AddCleanup(&sentinel{}, func(struct{}) {
		if ctx.Err() != nil {
			return
		}
		select {
		case collected <- struct{}{}:
		default:
		}
		watch(ctx, collected)
	}, struct{}{})
}

// A sentinel is garbage from its start. It has a pointer so that it is an object of
// its own.
type sentinel struct{ _ *sentinel }

// read returns one of the runtime's counts, and the largest number where it is none
// of this Go's.
func read(name string) uint64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return math.MaxUint64
	}
	return s[0].Value.Uint64()
}

// A pacer decides what share the heap may grow by.
type pacer struct {
	least, percent int
	last           time.Time // when it was collected
	made           uint64    // bytes, when it was told last
}

// collected notes a collection that left live bytes. If it came soon after the one
// before there is to be more room; less is to be as soon as more is alive.
func (p *pacer) collected(now time.Time, live uint64) {
	soon := now.Sub(p.last) < often
	p.last = now
	share := max(p.least, int(min(100*spare/max(live, 1), most)))
	if soon && share > p.percent*5/4 || share < p.percent*3/4 {
		p.percent = share
	}
}

// calm is told how many bytes were made since the start, and reports whether that is
// little since it was told before. Then there is to be no more room.
func (p *pacer) calm(made uint64) bool {
	little := made-p.made < little
	p.made = made
	if little {
		p.percent = p.least
	}
	return little
}
