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
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// often is how soon after the one before a collection shows that much is made.
	often = 200 * time.Millisecond
	// spare is what the heap may grow by then, in bytes.
	spare = 4 << 20
	// smallest is the heap below which Go does not collect at a GOGC of 100, in bytes.
	smallest = 4 << 20
	// After quiet looks in a row between which little was made, in bytes, the heap is to
	// be small again.
	look   = 200 * time.Millisecond
	quiet  = 3
	little = 1 << 20
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
			p.collected(time.Now(), use())
			if before == least && p.percent > least {
				tick.Reset(look)
			}
			if p.percent != before {
				debug.SetGCPercent(p.percent)
			}
		case <-tick.C:
			if p.calm(read("/gc/heap/allocs:bytes")) {
				tick.Stop()
				debug.SetGCPercent(least)
				runtime.GC() // there may be no other reason for one for long
			}
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

// read returns one of the runtime's counts, and 0 where it is none of this Go's.
func read(name string) uint64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}

// A usage is what the last collection found, in bytes.
type usage struct {
	live    uint64 // of the heap
	scanned uint64 // what GOGC is a share of: that, and stacks and globals
}

func use() usage {
	live := read("/gc/heap/live:bytes")
	return usage{live: live, scanned: live + read("/gc/scan/stack:bytes") + read("/gc/scan/globals:bytes")}
}

// share is how much the heap may grow by to have spare to grow, in per cent.
func (u usage) share() int {
	return int(min(100*spare/max(u.scanned, 1), 100*(u.live+spare)/smallest)) //nolint:gosec // at most 100*spare
}

// A pacer decides what share the heap may grow by.
type pacer struct {
	least, percent int
	last           time.Time // when it was collected
	made           uint64    // bytes, when it was told last
	quiet          int       // how often in a row it was little
}

// collected notes a collection. If it came soon after the one before there is to be more
// room; less is to be as soon as more is alive.
func (p *pacer) collected(now time.Time, u usage) {
	soon := now.Sub(p.last) < often
	p.last = now
	share := max(u.share(), p.least)
	if soon && share > p.percent*5/4 || share < p.percent*3/4 || share == p.least {
		p.percent = share
	}
}

// calm is told how many bytes were made since the start, and reports whether that was
// little for long enough. Then there is to be no more room.
func (p *pacer) calm(made uint64) bool {
	if made-p.made < little {
		p.quiet++
	} else {
		p.quiet = 0
	}
	p.made = made
	if p.quiet < quiet {
		return false
	}
	p.percent, p.quiet, p.last = p.least, 0, time.Time{} // what is collected now tells nothing
	return true
}
