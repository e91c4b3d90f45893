//go:build !linux

package pipe

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// Relays joins connections by a goroutine for each where there is no epoll(7).
type Relays struct{ wg sync.WaitGroup }

// NewRelays returns one, whatever it is told.
func NewRelays(int, *atomic.Int64) (*Relays, error) { return &Relays{}, nil }

// Close waits for all that is joined.
func (r *Relays) Close() { r.wg.Wait() }

// Dial connects for Join.
func (r *Relays) Dial(ctx context.Context, address string, setup func(fd int) error) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1, Control: control(setup)}
	return d.DialContext(ctx, "tcp", address)
}

// Listen listens for connections that are to be joined.
func Listen(ctx context.Context, address string, setup func(fd int) error) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1, Control: control(setup)}
	return lc.Listen(ctx, "tcp", address)
}

func control(setup func(fd int) error) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var inner error
		return errors.Join(c.Control(func(fd uintptr) { inner = setup(int(fd)) }), inner)
	}
}

// Join is the function [Join], and returns at once. When it is done it calls done.
// The function that it returns aborts both.
func (r *Relays) Join(a, b net.Conn, o Options, done func(Result)) (abort func()) {
	o.First = slices.Clone(o.First)
	r.wg.Go(func() { done(Join(a, b, o)) })
	return func() { Abort(a); Abort(b) }
}
