package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/internal/pause"
	"culvert/internal/pipe"
	"culvert/internal/sockopt"
)

// The time budgets of captured connections.
const (
	serverDialTimeout = 5 * time.Second
	shortestBackoff   = 5 * time.Millisecond
	longestBackoff    = time.Second
)

// An acceptor takes connections from any number of listeners, so many at once
// in all; more wait in the kernel.
type acceptor struct {
	log   *zap.Logger
	slots chan struct{}
	wg    sync.WaitGroup // the handlers'
}

func newAcceptor(log *zap.Logger, streams int) *acceptor {
	return &acceptor{log: log, slots: make(chan struct{}, streams)}
}

// run hands connections to serve, each in a goroutine of its own, until the
// listener is closed. Those that own says it has taken need no slot; it must not
// block, and nil takes none.
func (a *acceptor) run(ctx context.Context, ln *net.TCPListener, own func(*net.TCPConn) bool, serve func(*net.TCPConn)) {
	backoff := shortestBackoff
	for {
		c, err := ln.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, most likely: others may free some
			a.log.Error("accept on an endpoint", zap.Stringer("address", ln.Addr()), zap.Error(err))
			if !pause.For(ctx, backoff) {
				return
			}
			backoff = min(2*backoff, longestBackoff)
			continue
		}
		backoff = shortestBackoff
		if own != nil && own(c) {
			continue
		}
		select {
		case a.slots <- struct{}{}:
		case <-ctx.Done():
			pipe.Abort(c)
			return
		}
		a.wg.Go(func() {
			defer func() { <-a.slots }()
			serve(c)
		})
	}
}

// full tells whether a connection would have to wait.
func (a *acceptor) full() bool { return len(a.slots) == cap(a.slots) }

// remoteOf is where a captured connection comes from.
func remoteOf(c *net.TCPConn) netip.Addr { return addrOf(c.RemoteAddr()).Addr() }

func addrOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort() //nolint:errcheck,forcetypeassert // of a TCP connection
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// dialServer connects to the local server, from source if it is valid. The
// connection has the options of a stream.
func dialServer(ctx context.Context, services []Service, service string, source netip.Addr) (*net.TCPConn, error) {
	for _, s := range services {
		if s.Name != service || s.Packet {
			continue
		}
		d := net.Dialer{Timeout: serverDialTimeout, KeepAlive: -1, Control: func(network, address string, c syscall.RawConn) error {
			return errors.Join(freebind(network, address, c), sockopt.StreamControl(network, address, c))
		}}
		if source.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
		}
		c, err := d.DialContext(ctx, "tcp"+family(s.Local.Addr()), s.Local.String())
		if err != nil {
			return nil, fmt.Errorf("dial the server: %w", err)
		}
		return c.(*net.TCPConn), nil //nolint:errcheck,forcetypeassert // "tcp4" and "tcp6" give nothing else
	}
	return nil, fmt.Errorf("dial the server: no stream service %q", service)
}
