package netlab

import (
	"math/rand/v2"
	"time"
)

// A line decides what becomes of packets, and keeps those that are under way in
// the order in which they arrive. Times are nanoseconds on one clock. It is
// for one goroutine.
type line struct {
	random *rand.Rand
	rate   float64 // that busy was reckoned with
	busy   int64   // until then the rate is taken by packets before
	latest int64   // when the last packet arrives that is in order
	queue  []parcel
	n      uint64 // parcels so far
}

// A parcel is a packet under way: where it lies and when it arrives.
type parcel struct {
	due  int64
	n    uint64 // tells apart those of one time
	slot int32
	size int32
}

// A fate is what becomes of a packet.
type fate int

const (
	arrives fate = iota
	lost
	queueFull
)

// admit tells what becomes of a packet that enters now, and when it arrives.
func (l *line) admit(w *Way, now int64, size int) (due int64, f fate) {
	sent := now
	if w.Rate != l.rate {
		l.resize(w.Rate, now)
	}
	if w.Rate > 0 {
		begin := max(now, l.busy)
		waiting := float64(begin-now) * w.Rate / 8e9
		if waiting+float64(size) > float64(max(w.Queue, size)) {
			return 0, queueFull
		}
		l.busy = begin + int64(float64(size)*8e9/w.Rate)
		sent = l.busy
	}
	if w.Loss > 0 && l.random.Float64() < w.Loss {
		return 0, lost
	}
	due = sent + int64(w.Delay)
	if w.Jitter > 0 {
		due += l.random.Int64N(int64(w.Jitter))
	}
	if w.Reorder > 0 && l.random.Float64() < w.Reorder {
		return due + int64(w.Behind), arrives
	}
	l.latest = max(l.latest, due)
	return l.latest, arrives
}

// resize keeps the bytes that wait for the rate when it changes.
func (l *line) resize(rate float64, now int64) {
	if wait := l.busy - now; wait > 0 && rate > 0 {
		l.busy = now + int64(float64(wait)*l.rate/rate)
	}
	l.rate = rate
}

// push adds a packet that is under way. Most arrive after all others, so that
// this costs one comparison.
func (l *line) push(due int64, slot, size int) {
	l.n++
	p := parcel{due, l.n, int32(slot), int32(size)}
	l.queue = append(l.queue, p)
	i := len(l.queue) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !p.before(&l.queue[up]) {
			break
		}
		l.queue[i] = l.queue[up]
		i = up
	}
	l.queue[i] = p
}

// next is when the next packet arrives; ok is false if none is under way.
func (l *line) next() (due int64, ok bool) {
	if len(l.queue) == 0 {
		return 0, false
	}
	return l.queue[0].due, true
}

// pop takes the packet that arrives next.
func (l *line) pop() parcel {
	first := l.queue[0]
	last := len(l.queue) - 1
	p := l.queue[last]
	l.queue = l.queue[:last]
	for i := 0; ; {
		down := 2*i + 1
		if down >= last {
			if last > 0 {
				l.queue[i] = p
			}
			return first
		}
		if down+1 < last && l.queue[down+1].before(&l.queue[down]) {
			down++
		}
		if p.before(&l.queue[down]) {
			l.queue[i] = p
			return first
		}
		l.queue[i] = l.queue[down]
		i = down
	}
}

func (p *parcel) before(q *parcel) bool {
	return p.due < q.due || p.due == q.due && p.n < q.n
}

// A store holds packets in slots of one size, made a chunk at a time.
type store struct {
	chunks [][]byte
	free   []int32
}

const (
	// slotSize holds a packet of the device's MTU and the header before it.
	slotSize = 2048
	// chunkSlots is how many slots are made at a time.
	chunkSlots = 256
	// maxSlots bounds what is under way on one way: 128 MiB, which is 8 Gbit/s
	// for a tenth of a second.
	maxSlots = 1 << 16
)

// take returns a slot; ok is false if there are too many.
func (s *store) take() (slot int, ok bool) {
	if len(s.free) == 0 {
		made := len(s.chunks) * chunkSlots
		if made >= maxSlots {
			return 0, false
		}
		s.chunks = append(s.chunks, make([]byte, chunkSlots*slotSize))
		for i := range chunkSlots {
			s.free = append(s.free, int32(made+i))
		}
	}
	last := len(s.free) - 1
	slot = int(s.free[last])
	s.free = s.free[:last]
	return slot, true
}

// at is a slot's memory.
func (s *store) at(slot int) []byte {
	from := slot % chunkSlots * slotSize
	return s.chunks[slot/chunkSlots][from : from+slotSize]
}

func (s *store) give(slot int) { s.free = append(s.free, int32(slot)) }

// wait is how long ppoll(2) waits for a packet that is due.
func wait(due, now int64) time.Duration { return time.Duration(max(due-now, 0)) }
