// Package memnet is a network in memory, for tests: connections that behave like
// TCP's as far as this module relies on it, and that a synctest bubble can wait
// for.
//
//	a, b := memnet.Pipe()
//	a.Block() // writes of a do not return until Unblock
//
// Connections have bounded buffers, deadlines, half-close and reset. They are
// for any number of goroutines.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// BufferSize is how much may be under way in one direction, in bytes.
const BufferSize = 64 << 10

// ErrReset is what the other side sees of an Abort. It wraps ECONNRESET.
var ErrReset = fmt.Errorf("memnet: %w", syscall.ECONNRESET)

// A half is one direction of a connection.
type half struct {
	mu      sync.Mutex
	data    []byte
	ended   bool          // no more will be written
	err     error         // what both sides see from now on
	blocked bool          // writes wait
	changed chan struct{} // closed and replaced at each change
}

func newHalf() *half { return &half{changed: make(chan struct{})} }

// update changes the half and wakes whoever waits.
func (h *half) update(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	close(h.changed)
	h.changed = make(chan struct{})
}

// A Conn is one end of a connection.
type Conn struct {
	in, out            *half
	local, remote      net.Addr
	readBy, writeBy    deadline
	closeOnce          sync.Once
	closed             chan struct{}
	readLock, sendLock sync.Mutex
}

// Pipe returns the two ends of a connection.
func Pipe() (a, b *Conn) { return pipe(addr("memnet:a"), addr("memnet:b")) }

func pipe(x, y net.Addr) (a, b *Conn) {
	there, back := newHalf(), newHalf()
	a = &Conn{in: back, out: there, local: x, remote: y, closed: make(chan struct{})}
	b = &Conn{in: there, out: back, local: y, remote: x, closed: make(chan struct{})}
	for _, c := range []*Conn{a, b} {
		c.readBy.passed, c.writeBy.passed = make(chan struct{}), make(chan struct{})
	}
	return a, b
}

type addr string

func (addr) Network() string  { return "memnet" }
func (a addr) String() string { return string(a) }

// Read reads what the other side wrote: [io.EOF] after its CloseWrite or Close,
// [ErrReset] after its Abort.
func (c *Conn) Read(p []byte) (int, error) {
	c.readLock.Lock()
	defer c.readLock.Unlock()
	for {
		if err := c.check(&c.readBy); err != nil {
			return 0, err
		}
		c.in.mu.Lock()
		n, err := c.in.read(p)
		changed := c.in.changed
		c.in.mu.Unlock()
		if n > 0 || err != nil || len(p) == 0 {
			if n > 0 {
				c.in.update(func() {}) // there is room again
			}
			return n, err
		}
		c.wait(changed, &c.readBy)
	}
}

func (h *half) read(p []byte) (int, error) {
	switch {
	case h.err != nil:
		return 0, h.err
	case len(h.data) > 0:
		n := copy(p, h.data)
		h.data = h.data[n:]
		return n, nil
	case h.ended:
		return 0, io.EOF
	}
	return 0, nil
}

// Write writes all of p, waiting for room as it must. After the other side's
// Close it fails with EPIPE, after its Abort with [ErrReset].
func (c *Conn) Write(p []byte) (int, error) {
	c.sendLock.Lock()
	defer c.sendLock.Unlock()
	written := 0
	for {
		if err := c.check(&c.writeBy); err != nil {
			return written, err
		}
		var n int
		var err error
		c.out.mu.Lock()
		room := BufferSize - len(c.out.data)
		switch {
		case c.out.err != nil:
			err = c.out.err
		case c.out.ended:
			err = syscall.EPIPE
		case !c.out.blocked && room > 0:
			n = min(room, len(p)-written)
		}
		blocked, changed := c.out.blocked, c.out.changed
		c.out.mu.Unlock()
		if err != nil {
			return written, err
		}
		if n > 0 {
			part := p[written : written+n]
			c.out.update(func() { c.out.data = append(c.out.data, part...) })
			written += n
		}
		if written == len(p) && !blocked {
			return written, nil
		}
		if n == 0 {
			c.wait(changed, &c.writeBy)
		}
	}
}

// check tells why nothing can be done any more at this end.
func (c *Conn) check(d *deadline) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	select {
	case <-d.wait():
		return os.ErrDeadlineExceeded
	default:
		return nil
	}
}

func (c *Conn) wait(changed <-chan struct{}, d *deadline) {
	select {
	case <-changed:
	case <-d.wait():
	case <-c.closed:
	}
}

// CloseWrite ends this side's data; the other side's goes on.
func (c *Conn) CloseWrite() error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	c.out.update(func() { c.out.ended = true })
	return nil
}

// Close ends both directions: the other side reads what is under way and then
// io.EOF, and cannot write any more.
func (c *Conn) Close() error {
	err := net.ErrClosed
	c.closeOnce.Do(func() {
		err = nil
		close(c.closed)
		c.out.update(func() { c.out.ended = true })
		c.in.update(func() { c.in.ended = true })
	})
	return err
}

// Abort ends both directions so that the other side sees [ErrReset].
func (c *Conn) Abort() {
	c.closeOnce.Do(func() {
		close(c.closed)
		reset := func(h *half) { h.update(func() { h.err, h.data = ErrReset, nil }) }
		reset(c.out)
		reset(c.in)
	})
}

// Block makes this side's writes wait, as if the path had gone, until Unblock.
func (c *Conn) Block() { c.out.update(func() { c.out.blocked = true }) }

// Unblock ends what Block began.
func (c *Conn) Unblock() { c.out.update(func() { c.out.blocked = false }) }

// LocalAddr and RemoteAddr are names of no meaning.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is the other side's LocalAddr.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline ends reads, those that wait included, at t; never if t is zero.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readBy, t) }

// SetWriteDeadline does the same for writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeBy, t) }

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	d.set(t)
	return nil
}

// A deadline is a channel that is closed when its time has come.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	passed chan struct{}
}

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	// Who waits on the old channel must look again, or a later deadline would
	// not hold for it: it is closed, and the waiter finds a new one.
	old := d.passed
	d.passed = make(chan struct{})
	closeOnce(old)
	if t.IsZero() {
		return
	}
	passed := d.passed
	if left := time.Until(t); left > 0 {
		d.timer = time.AfterFunc(left, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.passed == passed {
				closeOnce(passed)
			}
		})
		return
	}
	closeOnce(passed)
}

func closeOnce(ch chan struct{}) {
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// A Listener accepts connections that are dialled with its Dial.
type Listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// Listen returns a listener with room for 128 connections that wait.
func Listen() *Listener {
	return &Listener{conns: make(chan net.Conn, 128), closed: make(chan struct{})}
}

// Dial connects to the listener.
func (l *Listener) Dial(ctx context.Context) (net.Conn, error) {
	a, b := pipe(addr("memnet:dialler"), l.Addr())
	select {
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	default:
	}
	select {
	case l.conns <- b:
		return a, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept returns the next connection; [net.ErrClosed] after Close.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends the listener.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr is a name of no meaning.
func (l *Listener) Addr() net.Addr { return addr("memnet:listener") }
