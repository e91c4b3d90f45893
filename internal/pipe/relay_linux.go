package pipe

import (
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// worthAPipe is how many bytes must have come at once for the next to be moved through
// a pipe. A few are copied sooner than it is fetched, by a buffer of that size.
const worthAPipe = 32 << 10

// A relay is two connections that a loop joins. Its directions take turns: what
// Join tells apart by two goroutines comes here in the order of events.
type relay struct {
	relays *Relays
	loop   *loop
	slot   int32
	done   func(Result)

	mu   sync.Mutex
	ends [2]end
	ways [2]way // ways[i] is from ends[i] to the other
	err  error
	over bool
	owed chan struct{} // see fail
}

// An end is one of the connections.
type end struct {
	conn net.Conn
	fd   int
	// ending tells that the peer has ended its side, or more, and that there is
	// an end to be read; gone that there is no connection any more.
	ending, gone bool
	wanted       bool // the kernel tells of room to write
	deaf         bool // the kernel does not tell of bytes that have come
}

// events are those that the kernel tells of.
func (e *end) events() uint32 {
	events := uint32(watched)
	if e.wanted {
		events = wanted
	}
	if e.deaf {
		events &^= unix.EPOLLIN
	}
	return events
}

// find asks for the descriptor, which stays the same until the relay closes it.
func (e *end) find() bool {
	switch c := e.conn.(type) {
	case *socket:
		return c.Control(func(fd int) error { e.fd = fd; return nil }) == nil
	case *net.TCPConn:
		raw, err := c.SyscallConn()
		return err == nil && raw.Control(func(fd uintptr) { e.fd = int(fd) }) == nil
	}
	return false
}

// flushed reports whether the peer has all that was written.
func (e *end) flushed() bool {
	i, err := unix.GetsockoptTCPInfo(e.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err != nil || i.State == stateClosed || i.Unacked == 0 && i.Notsent_bytes == 0
}

// A way is one direction.
type way struct {
	count counter
	n     int64 // bytes handed on

	pipe *kernelPipe // held only while bytes move
	held int         // bytes in it
	rest []byte      // copied and not handed on; where there is no pipe
	bulk bool        // the last bytes to come were worth a pipe
	next bool        // has another turn after everybody else's

	ended bool // nothing more is handed on
}

func newRelay(r *Relays, l *loop, a, b net.Conn, o Options, done func(Result)) *relay {
	return &relay{
		relays: r, loop: l, done: done,
		ends: [2]end{{conn: a}, {conn: b}},
		ways: [2]way{{count: counter{o.AtoB}}, {count: counter{o.BtoA}}},
	}
}

// begin sends what goes first, and has the relay watched. It reports false, and has
// done nothing, where that is not possible. What cannot be sent waits for the loop,
// and so does an error, which the loop will see too.
func (r *relay) begin(first []byte) bool {
	r.mu.Lock() // events come at once
	defer r.mu.Unlock()
	if !r.ends[0].find() || !r.ends[1].find() {
		return false
	}
	var ok bool
	if r.slot, ok = r.loop.watch(r, watched, r.ends[0].fd, r.ends[1].fd); !ok {
		return false
	}
	if len(first) == 0 {
		return true
	}
	w := &r.ways[0]
	n, errno := rawWrite(r.ends[1].fd, first)
	if errno != 0 {
		n = 0
	}
	w.handed(n)
	if n < len(first) {
		w.rest = slices.Clone(first[n:])
		r.want(1)
	}
	return true
}

// want waits for room to write to a side.
func (r *relay) want(side int) {
	if e := &r.ends[side]; !e.wanted {
		e.wanted = true
		r.loop.change(r.slot, side, e.fd, e.events())
	}
}

// listen has the loop told of bytes that come from a side, or not.
func (r *relay) listen(side int, so bool) {
	if e := &r.ends[side]; e.deaf == so {
		e.deaf = !so
		r.loop.change(r.slot, side, e.fd, e.events())
	}
}

// serve does what an event of one side asks for. In the loop's goroutine.
func (r *relay) serve(side int, events uint32) {
	r.mu.Lock()
	e := &r.ends[side]
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		e.gone = true
	}
	if e.gone || events&unix.EPOLLRDHUP != 0 {
		e.ending = true
	}
	if e.ending || events&unix.EPOLLIN != 0 {
		r.move(side)
	}
	if (e.gone || events&unix.EPOLLOUT != 0) && r.ways[1-side].waits() {
		r.move(1 - side)
	}
	if e.gone && r.ways[side].ended && !r.ways[1-side].ended {
		// It had ended its side before, and would have been read no more. Where
		// the other direction has ended too it is the end of both.
		r.fail(syscall.ECONNRESET, 1-side, false)
	}
	r.leave()
}

// proceed goes on with a side that had its turn. In the loop's goroutine.
func (r *relay) proceed(side int) {
	r.mu.Lock()
	r.ways[side].next = false
	r.move(side)
	r.leave()
}

// requeue gives a side another turn. In the loop's goroutine.
func (r *relay) requeue(side int) {
	if w := &r.ways[side]; !w.next {
		w.next = true
		r.loop.again = append(r.loop.again, turn{r, side})
	}
}

// abort is for others than the loop.
func (r *relay) abort() {
	r.mu.Lock()
	if !r.over {
		r.cut(net.ErrClosed)
	}
	r.leave()
}

// leave unlocks, and tells the result if it was that.
func (r *relay) leave() {
	done := r.done
	if r.over {
		r.done = nil
	}
	over, result := r.over, Result{AtoB: r.ways[0].n, BtoA: r.ways[1].n, Reset: r.err != nil, Err: r.err}
	r.mu.Unlock()
	if over && done != nil {
		done(result)
	}
}

func (w *way) waits() bool { return w.held > 0 || len(w.rest) > 0 }

// move hands on what one side has sent, once. Where there may be more it has another
// turn after everybody else's: more has come by then for one call to take. While there
// is no room for what has come the loop is not told of more: it would wake up for each
// segment, and for nothing.
func (r *relay) move(side int) {
	w := &r.ways[side]
	if !w.ended && r.drain(side) && r.fill(side) && r.drain(side) {
		r.requeue(side)
		return
	}
	if !w.ended {
		r.listen(side, !w.waits())
	}
}

// drain hands on what is held, and reports whether nothing is left.
func (r *relay) drain(side int) bool {
	w, to := &r.ways[side], r.ends[1-side].fd
	for w.waits() {
		n, errno := w.drainOnce(to)
		switch errno {
		case 0:
			w.handed(n)
			if w.held > 0 {
				w.held -= n
				r.relays.spliced.Add(int64(n))
			} else if w.rest = w.rest[n:]; len(w.rest) == 0 {
				w.rest = nil
			}
		case syscall.EINTR:
		case syscall.EAGAIN:
			r.want(1 - side)
			return false
		default:
			r.failWrite(side, errno)
			return false
		}
	}
	return true
}

func (w *way) drainOnce(to int) (int, syscall.Errno) {
	if w.held == 0 {
		return rawWrite(to, w.rest)
	}
	return rawSplice(w.pipe.r, to, w.held)
}

func (w *way) handed(n int) {
	w.n += int64(n)
	w.count.add(n)
}

// fill takes what has come, and reports whether there may be more. Called with
// nothing held.
func (r *relay) fill(side int) bool {
	w := &r.ways[side]
	if w.bulk && w.pipe == nil {
		w.pipe = pipes.get()
	}
	if w.pipe == nil {
		return r.copy(side)
	}
	for {
		n, errno := rawSplice(r.ends[side].fd, w.pipe.w, w.pipe.size)
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == 0 && n > 0:
			w.held, w.bulk, r.loop.bulk = n, n >= worthAPipe, true
			return true
		}
		w.release()
		return r.read(side, errno)
	}
}

// copy moves what has come without a pipe, by the loop's own buffer. TCP gives
// all that it has: less than the buffer takes is the last of it, for now.
func (r *relay) copy(side int) bool {
	w, buf := &r.ways[side], r.loop.buf[:]
	n, errno := rawRead(r.ends[side].fd, buf)
	switch {
	case errno == syscall.EINTR:
		return true
	case errno != 0:
		return r.read(side, errno)
	case n == 0:
		return r.read(side, 0)
	}
	w.bulk = n == len(buf)
	k, errno := rawWrite(r.ends[1-side].fd, buf[:n])
	switch errno {
	case 0:
		w.handed(k)
	case syscall.EAGAIN, syscall.EINTR:
		k = 0
	default:
		r.failWrite(side, errno)
		return false
	}
	if k < n {
		w.rest = slices.Clone(buf[k:n])
	}
	return k < n || w.bulk || r.ends[side].ending
}

// read takes a read that brought nothing: there is nothing now, or it is the end.
func (r *relay) read(side int, errno syscall.Errno) bool {
	switch errno {
	case syscall.EAGAIN:
	case 0:
		r.finish(side)
	default:
		r.failRead(side, errno)
	}
	return false
}

// finish passes a clean end on.
func (r *relay) finish(side int) {
	other := &r.ways[1-side]
	if r.ends[side].gone && !other.ended {
		// It was reset behind its end. The kernel says so once, and then of an end.
		r.failRead(side, syscall.ECONNRESET)
		return
	}
	r.end(side)
	if r.err != nil {
		return // whose error it was aborts both
	}
	if other.ended { // and both have been read to their ends: a close is an end, too
		r.close(func(c net.Conn) { _ = c.Close() })
		return
	}
	if errno := rawShutdown(r.ends[1-side].fd, unix.SHUT_WR); errno != 0 && errno != syscall.ENOTCONN {
		r.fail(errno, side, false)
	}
}

func (r *relay) failRead(side int, err error) {
	r.end(side)
	r.fail(err, 1-side, false)
}

// failWrite ends a direction that its reader takes no more of. What that peer has
// sent before its reset goes first.
func (r *relay) failWrite(side int, err error) {
	r.end(side)
	r.fail(err, side, byPeer(err))
}

// end ends a direction.
func (r *relay) end(side int) {
	w := &r.ways[side]
	w.ended, w.rest = true, nil
	w.release()
	if r.owed != nil {
		close(r.owed)
		r.owed = nil
	}
}

// release gives the pipe back. One that holds bytes is closed.
func (w *way) release() {
	if w.pipe == nil {
		return
	}
	if w.held > 0 {
		w.pipe.close()
	} else {
		pipes.put(w.pipe)
	}
	w.pipe, w.held = nil, 0
}

// fail aborts both connections for a first error, as soon as all that was handed
// to the one that still works has reached its peer, within [Grace]. Where the
// other direction owes something it goes on until its end before.
func (r *relay) fail(err error, alive int, owing bool) {
	if r.err != nil || r.over {
		return
	}
	r.err = err
	if owing = owing && !r.ways[1-alive].ended; !owing {
		r.ways[0].ended, r.ways[1].ended = true, true
		if r.ends[alive].flushed() {
			r.cut(err)
			return
		}
	}
	var owed chan struct{}
	if owing {
		owed = make(chan struct{})
		r.owed = owed
		r.requeue(1 - alive)
	}
	r.relays.wg.Go(func() { r.wind(alive, owed) })
}

// wind waits for what must not be lost, and aborts.
func (r *relay) wind(alive int, owed <-chan struct{}) {
	over := time.NewTimer(Grace)
	defer over.Stop()
	expired := false
	if owed != nil {
		select {
		case <-owed:
		case <-over.C:
			expired = true
		}
	}
	tick := time.NewTicker(flushPoll)
	defer tick.Stop()
	for !r.wound(alive, expired) {
		select {
		case <-tick.C:
		case <-over.C:
			expired = true
		}
	}
}

// wound aborts the connections, if there is nothing more to wait for, and reports
// whether they are at their end.
func (r *relay) wound(alive int, expired bool) bool {
	r.mu.Lock()
	if !r.over && (expired || r.ends[alive].flushed()) {
		r.cut(r.err)
	}
	over := r.over
	r.leave()
	return over
}

// cut resets both connections.
func (r *relay) cut(err error) {
	if r.err == nil {
		r.err = err
	}
	r.close(Abort)
}

func (r *relay) close(each func(net.Conn)) {
	r.over = true
	r.end(0)
	r.end(1)
	each(r.ends[0].conn)
	each(r.ends[1].conn)
	r.loop.forget(r.slot)
}
