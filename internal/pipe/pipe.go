// Package pipe is the one copy loop: it joins two connections until both have
// ended.
//
//	r := pipe.Join(near, far, pipe.Options{AtoB: bytesOut, BtoA: bytesIn})
//
// An end is passed on as what it was. A clean end of one side is a half-close
// of the other, and the other direction goes on for as long as it likes. Every
// other end, a reset or a truncated TLS connection among them, resets both
// sides at once. Two TCP connections are joined in the kernel, by splice(2).
//
// Join owns both connections and starts one goroutine, which has ended when it
// returns. It sets no time limit: who wants one sets TCP options, or aborts
// the connections with [Abort].
package pipe

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// A Counter takes counts of bytes while they pass; a prometheus.Counter is one.
type Counter interface{ Add(n float64) }

// Options configure a [Join].
type Options struct {
	AtoB, BtoA Counter // payload bytes as they are handed on; nil counts nowhere
}

// A Result is how a [Join] ended.
type Result struct {
	AtoB, BtoA int64 // bytes handed on
	// Reset tells that the connections were reset, and not ended by both sides.
	Reset bool
	// Err is the first error in either direction, nil after a clean end. An
	// end of the peer's making (ECONNRESET, EPIPE, io.ErrUnexpectedEOF) is
	// reported too: it is a fact, not a fault.
	Err error
}

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
// closes both.
func Join(a, b net.Conn, o Options) Result {
	j := &joined{a: a, b: b}
	var r Result
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.BtoA = j.copy(a, b, o.BtoA)
	}()
	r.AtoB = j.copy(b, a, o.AtoB)
	<-done
	r.Err, r.Reset = j.err, j.err != nil
	_ = a.Close()
	_ = b.Close() // after an abort they are closed already
	return r
}

// joined is what the two directions share.
type joined struct {
	a, b net.Conn

	mu    sync.Mutex
	ended int // directions that came to a clean end
	err   error
}

// copy moves bytes from src to dst until src ends, passes the end on, and
// returns how many there were.
func (j *joined) copy(dst, src net.Conn, count Counter) int64 {
	n, err := move(dst, src, counter{count})
	if err == nil {
		err = closeWrite(dst)
	}
	if err != nil {
		j.fail(err)
		return n
	}
	if j.finish() {
		return n
	}
	// The other direction goes on. A reset of src would be seen there only at
	// its next write, which may never come: so it is waited for here.
	if tcp, ok := src.(*net.TCPConn); ok && awaitReset(tcp) {
		j.fail(syscall.ECONNRESET)
	}
	return n
}

// fail aborts both connections, which ends the other direction too. The first
// error is the one that tells.
func (j *joined) fail(err error) {
	j.mu.Lock()
	first := j.err == nil
	if first {
		j.err = err
	}
	j.mu.Unlock()
	if first {
		Abort(j.a)
		Abort(j.b)
	}
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

// bufferSize is for connections that cannot be spliced: two TLS records.
const bufferSize = 32 << 10

//nolint:gochecknoglobals // buffers are of use to every join of the process
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// move copies from src to dst until src ends. A clean end is nil.
func move(dst, src net.Conn, count counter) (int64, error) {
	if from, ok := src.(*net.TCPConn); ok {
		return moveFromTCP(dst, from, count)
	}
	return copyBuffer(dst, src, count)
}

func copyBuffer(dst io.Writer, src io.Reader, count counter) (n int64, err error) {
	buf := buffers.Get().(*[bufferSize]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	defer buffers.Put(buf)
	for {
		k, rerr := src.Read(buf[:])
		if k > 0 {
			m, werr := dst.Write(buf[:k])
			n += int64(m)
			count.add(m)
			if werr != nil {
				return n, werr
			}
		}
		if errors.Is(rerr, io.EOF) {
			return n, nil
		}
		if rerr != nil {
			return n, rerr
		}
	}
}

// counter is a Counter that may be nil.
type counter struct{ to Counter }

func (c counter) add(n int) {
	if c.to != nil && n > 0 {
		c.to.Add(float64(n))
	}
}
