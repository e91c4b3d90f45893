package packet

import "time"

const (
	// minRing is the ring's first size in frames; it doubles up to the limit, so that a thousand quiet links
	// stay small.
	minRing = 8
	// maxFree bounds what a link keeps of used buffers, in bytes.
	maxFree = 256 << 10
)

// frame is one packet that waits, header included.
type frame struct {
	at      time.Time // when it was sent to the link
	buf     []byte
	retried bool // one connection broke already while it was written
}

// queue is a bounded ring of frames with the buffers that are free for the next ones. Buffers are reused last in,
// first out: a steady flow touches a few of them, not one for each place in the ring. The zero value is of no
// use: max must be set. Its owner locks.
type queue struct {
	max  int // frames
	ring []frame
	head int
	n    int

	free  [][]byte
	spare int // bytes in free
}

func (q *queue) full() bool { return q.n == q.max }

// push copies payload into a frame at the tail. The queue must not be full.
func (q *queue) push(payload []byte, now time.Time) {
	q.grow()
	f := &q.ring[(q.head+q.n)%len(q.ring)]
	f.at, f.retried = now, false
	f.buf = AppendFrame(q.buffer(), payload)
	q.n++
}

// unpop puts a frame back at the head; false if there is no room.
func (q *queue) unpop(f frame) bool {
	if q.full() {
		return false
	}
	q.grow()
	q.head = (q.head + len(q.ring) - 1) % len(q.ring)
	q.ring[q.head] = f
	q.n++
	return true
}

// oldest returns the frame at the head, nil if there is none.
func (q *queue) oldest() *frame {
	if q.n == 0 {
		return nil
	}
	return &q.ring[q.head]
}

// pop removes the frame at the head, which must exist; it is recycled when it is not needed any more.
func (q *queue) pop() frame {
	f := q.ring[q.head]
	q.ring[q.head] = frame{}
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	return f
}

func (q *queue) recycle(f frame) {
	if c := cap(f.buf); q.spare+c <= maxFree {
		q.free = append(q.free, f.buf[:0])
		q.spare += c
	}
}

// trim gives the memory back; an empty queue starts small again.
func (q *queue) trim() {
	q.free, q.spare = nil, 0
	if q.n == 0 {
		q.ring, q.head = nil, 0
	}
}

func (q *queue) buffer() []byte {
	last := len(q.free) - 1
	if last < 0 {
		return nil
	}
	b := q.free[last]
	q.free[last] = nil
	q.free = q.free[:last]
	q.spare -= cap(b)
	return b
}

func (q *queue) grow() {
	if q.n < len(q.ring) {
		return
	}
	ring := make([]frame, min(max(minRing, 2*len(q.ring)), q.max))
	for i := range q.n {
		ring[i] = q.ring[(q.head+i)%len(q.ring)]
	}
	q.ring, q.head = ring, 0
}
