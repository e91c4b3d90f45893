// Package pipe is the one copy loop: it joins two connections until both have
// ended.
//
//	r := pipe.Join(near, far, pipe.Options{AtoB: bytesOut, BtoA: bytesIn})
//
// An end is passed on as what it was. A clean end of one side is a half-close
// of the other, and the other direction goes on for as long as it likes. Every
// other end, a reset or a truncated TLS connection among them, resets both
// sides, as soon as what had arrived before it has been handed on or [Grace]
// is over. Two TCP connections are joined in the kernel, by splice(2).
//
// Join owns both connections and starts one goroutine, which has ended when it
// returns. It sets no other time limit: who wants one sets TCP options, or
// aborts the connections with [Abort].
package pipe

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A Counter takes counts of bytes while they pass; a prometheus.Counter is one.
type Counter interface{ Add(n float64) }

// Options configure a [Join].
type Options struct {
	AtoB, BtoA Counter // payload bytes as they are handed on; nil counts nowhere
	// First is what goes to b before all that a reads. It may be used for other
	// things as soon as a call that takes it has returned.
	First []byte
}

// A Result is how a [Join] ended.
type Result struct {
	AtoB, BtoA int64 // bytes handed on
	// Reset tells that the connections were reset, and not ended by both sides.
	Reset bool
	// Err is the first error in either direction, nil after a clean end. An
	// end of the peer's making (ECONNRESET, EPIPE, io.ErrUnexpectedEOF) is
	// reported too: it is a fact, not a fault. Where a write failed and what
	// the peer had sent before tells why, such as an alert, Err wraps both.
	Err error
}

// Grace bounds how long a reset is held back for bytes that arrived before it.
const Grace = time.Second

// flushPoll is how often a connection is asked whether its peer has everything;
// the kernel tells nobody of its own accord.
const flushPoll = 5 * time.Millisecond

// Abort closes a connection so that its peer sees a reset. A connection that
// knows how (an Abort method) is asked; for TCP it is a close without linger.
func Abort(c net.Conn) {
	if a, ok := c.(interface{ Abort() }); ok {
		a.Abort()
		return
	}
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // fails on a closed connection alone
	}
	_ = c.Close()
}

// Join copies from each connection to the other until both have ended, and
// closes both. One that knows by itself whether it is reset after its clean end has
// a method AwaitReset() bool, which waits for that until its read deadline passes.
func Join(a, b net.Conn, o Options) Result {
	j := &joined{a: a, b: b}
	there := &direction{dst: b, src: a, count: counter{o.AtoB}, first: o.First, moved: make(chan struct{})}
	back := &direction{dst: a, src: b, count: counter{o.BtoA}, moved: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		j.run(back, there)
	}()
	j.run(there, back)
	<-done
	_ = a.Close()
	_ = b.Close() // after an abort they are closed already
	return Result{AtoB: there.n, BtoA: back.n, Reset: j.err != nil, Err: j.err}
}

// A direction is one of the two copies of a join.
type direction struct {
	dst, src net.Conn
	count    counter
	first    []byte        // goes before what src reads
	n        int64         // bytes handed on, of use when moved is closed
	moved    chan struct{} // closed when no more will be handed on
	ending   atomic.Bool   // dst is being told the end
}

// joined is what the two directions share.
type joined struct {
	a, b net.Conn

	mu      sync.Mutex
	ended   int // directions that came to a clean end
	err     error
	aborted bool
}

// run moves bytes until d.src ends, and passes the end on.
func (j *joined) run(d, other *direction) {
	var read, write error
	if len(d.first) > 0 {
		var n int
		n, write = d.dst.Write(d.first)
		d.n = int64(n)
		d.count.add(n)
	}
	if write == nil {
		var n int64
		n, read, write = move(d.dst, d.src, d.count)
		d.n += n
	}
	if read == nil && write == nil && !other.ending.Load() && isDead(d.src) {
		// It was reset, and a write of the other direction has used the error
		// up: the kernel gives it to one call alone, and to the next an end.
		read = syscall.ECONNRESET
	}
	first := read != nil && j.first(read) // before the other direction, which may wait for this, goes on
	close(d.moved)
	if read == nil && write == nil {
		if j.failing() {
			return // whose error it was aborts both
		}
		d.ending.Store(true)
		write = closeWrite(d.dst)
	}
	switch {
	case write != nil && byPeer(write):
		// The peer may have answered and closed without reading on, and its
		// reset has come behind the answer: that goes first.
		j.fail(write, d.src, other.moved)
	case write != nil:
		j.fail(write, d.src, nil)
	case first:
		j.wind(d.dst, nil)
	case read != nil: // another's error was the first, and aborts both
	case !j.finish():
		j.watch(d, other)
	}
}

// watch waits for a reset of d.src, which has ended cleanly, while the other
// direction goes on: it would see one only at its next write, which may never
// come. When that direction is ending too, a reset is but a peer's answer to
// the close_notify that it does not wait for.
//
// Beneath TLS a FIN is no reset, though whoever closes the connection whole
// sends one behind its close_notify. The local server is entitled to the bytes
// before it, however slowly it reads them, and to their clean end, as without a
// relay; and a FIN is also what a peer sends that half-closes TCP along with
// TLS and goes on reading. Keepalive tells the two apart: the kernel of a peer
// that has closed forgets the connection after a minute (tcp_fin_timeout) and
// resets it at the next probe.
func (j *joined) watch(d, other *direction) {
	reset := false
	if w, ok := d.src.(interface{ AwaitReset() bool }); ok {
		reset = w.AwaitReset()
	} else if c := tcpOf(d.src); c != nil {
		reset = awaitReset(c)
	}
	if reset && !other.ending.Load() {
		j.fail(syscall.ECONNRESET, d.dst, nil)
	}
}

// fail aborts both connections, which ends the other direction too. The first
// error is the one that tells, and waits, for [Grace] at most, until owed is
// closed and all that was handed to the connection that still works, alive, has
// reached its peer. An abort discards what has not.
func (j *joined) fail(err error, alive net.Conn, owed <-chan struct{}) {
	if j.first(err) {
		j.wind(alive, owed)
	}
}

// wind waits for what must not be lost, and aborts.
func (j *joined) wind(alive net.Conn, owed <-chan struct{}) {
	over := make(chan struct{})
	defer time.AfterFunc(Grace, func() { close(over) }).Stop()
	if owed != nil {
		select {
		case <-owed:
		case <-over:
		}
	}
	flush(alive, over)
	j.mu.Lock()
	j.aborted = true
	j.mu.Unlock()
	Abort(j.a)
	Abort(j.b)
}

// first notes an error and reports whether it is the first. A later one is
// added as long as it can have come of nothing but what a peer sent.
func (j *joined) first(err error) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.err == nil:
		j.err = err
		return true
	case !j.aborted && byPeer(j.err) && !byPeer(err) && !errors.Is(err, net.ErrClosed):
		j.err = fmt.Errorf("%w: %w", j.err, err)
	}
	return false
}

func (j *joined) failing() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.err != nil
}

// finish notes a direction's clean end. The second one ends awaitReset in the
// first, and reports true.
func (j *joined) finish() bool {
	j.mu.Lock()
	j.ended++
	both := j.ended == 2
	j.mu.Unlock()
	if both {
		past := time.Unix(1, 0)
		_ = j.a.SetReadDeadline(past)
		_ = j.b.SetReadDeadline(past) // both have been read to their ends
	}
	return both
}

// byPeer tells an end that the peer made from one that has other causes.
func byPeer(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrUnexpectedEOF)
}

// flush waits until the peer of c has acknowledged all that was written, or over
// is closed.
func flush(c net.Conn, over <-chan struct{}) {
	tcp := tcpOf(c)
	if tcp == nil || isFlushed(tcp) {
		return
	}
	tick := time.NewTicker(flushPoll)
	defer tick.Stop()
	for !isFlushed(tcp) {
		select {
		case <-tick.C:
		case <-over:
			return
		}
	}
}

// isDead reports whether c is a TCP connection that was reset or has ended both
// ways, or is one over such.
func isDead(c net.Conn) bool {
	tcp := tcpOf(c)
	return tcp != nil && isClosed(tcp)
}

// tcpOf returns the TCP connection that c is, or that it says is beneath it, or
// nil. It is watched and never read or written.
func tcpOf(c net.Conn) *net.TCPConn {
	switch c := c.(type) {
	case *net.TCPConn:
		return c
	case interface{ TCP() *net.TCPConn }:
		return c.TCP()
	}
	return nil
}

// closeWrite half-closes c, or closes it where it cannot be half-closed. That
// the peer has closed its side too is no error.
func closeWrite(c net.Conn) error {
	var err error
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		err = h.CloseWrite()
	} else {
		err = c.Close()
	}
	if errors.Is(err, syscall.ENOTCONN) {
		return nil
	}
	return err
}

const (
	// partSize is how much a source gives at a time that has ReadMore: a TLS record.
	partSize = 16 << 10
	// bufferSize is for connections that cannot be spliced: four such parts, and a byte
	// more. A source that has filled a buffer may have more, and would be read at once.
	bufferSize = 4*partSize + 1
)

//nolint:gochecknoglobals // buffers are of use to every join of the process
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// move copies from src to dst until src ends. A clean end is no error of
// either.
func move(dst, src net.Conn, count counter) (n int64, read, write error) {
	if from, ok := src.(*net.TCPConn); ok {
		return moveFromTCP(dst, from, count)
	}
	return copyBuffer(dst, src, count)
}

// copyBuffer holds a buffer while it waits only where src cannot wait without one:
// it would do so by a method AwaitRead.
func copyBuffer(dst io.Writer, src io.Reader, count counter) (n int64, read, write error) {
	waits, _ := src.(interface{ AwaitRead() })
	for {
		if waits != nil {
			waits.AwaitRead()
		}
		k, read, write := copyOnce(dst, src)
		n += int64(k)
		count.add(k)
		if write != nil || errors.Is(read, io.EOF) {
			return n, nil, write
		}
		if read != nil {
			return n, read, nil
		}
	}
}

// copyOnce copies what there is. A source that reads by parts, as TLS does by records,
// has a method ReadMore, which does not wait: several go by one write.
func copyOnce(dst io.Writer, src io.Reader) (n int, read, write error) {
	buf := buffers.Get().(*[bufferSize]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	defer buffers.Put(buf)
	n, read = src.Read(buf[:])
	if more, ok := src.(interface{ ReadMore(p []byte) (int, error) }); ok {
		for k := n; k > 0 && read == nil && len(buf)-n > partSize; n += k {
			k, read = more.ReadMore(buf[n:])
		}
	}
	if n > 0 {
		n, write = dst.Write(buf[:n])
	}
	return n, read, write
}

// counter is a Counter that may be nil.
type counter struct{ to Counter }

func (c counter) add(n int) {
	if c.to != nil && n > 0 {
		c.to.Add(float64(n))
	}
}
