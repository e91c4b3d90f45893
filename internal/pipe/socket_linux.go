package pipe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A socket is a connection that was dialled for [Relays.Join], which alone reads and
// writes it. It has none of what a net.TCPConn has for goroutines that wait.
type socket struct {
	to netip.AddrPort

	mu sync.Mutex
	fd int // -1 when closed
}

var errUnjoined = errors.New("read or write a connection that is to be joined")

// Dial connects for [Relays.Join]: the connection can be joined, closed and aborted,
// and given options (Control), and nothing else. setup is called with the socket before it connects. What cannot
// be dialled so, a name or a zone, is dialled by a [net.Dialer] with the same setup.
func (r *Relays) Dial(ctx context.Context, address string, setup func(fd int) error) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || to.Addr().Zone() != "" {
		d := net.Dialer{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error { return control(c, setup) }}
		return d.DialContext(ctx, "tcp", address)
	}
	s := &socket{to: to}
	if err := r.connect(ctx, s, setup); err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: s.RemoteAddr(), Err: err}
	}
	return s, nil
}

func control(c syscall.RawConn, setup func(fd int) error) error {
	var inner error
	return errors.Join(c.Control(func(fd uintptr) { inner = setup(int(fd)) }), inner)
}

func (r *Relays) connect(ctx context.Context, s *socket, setup func(fd int) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	family, name := sockaddr(s.to)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	s.fd = fd
	if err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		err = fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	if err == nil {
		err = setup(fd)
	}
	if err == nil {
		err = r.reach(ctx, fd, name)
	}
	if err != nil {
		_ = s.Close()
	}
	return err
}

// reach connects a socket. On one host the connection is there at once.
func (r *Relays) reach(ctx context.Context, fd int, name unix.Sockaddr) error {
	err := unix.Connect(fd, name)
	if err == nil {
		return nil
	}
	if !errors.Is(err, syscall.EINPROGRESS) && !errors.Is(err, syscall.EINTR) {
		return os.NewSyscallError("connect", err)
	}
	if ready, err := connected(fd); ready {
		return err
	}
	return r.loop().await(ctx, fd)
}

// connected reports whether an attempt to connect has come to an end, and to which.
func connected(fd int) (ready bool, err error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}} //nolint:gosec // a descriptor
	if n, err := unix.Poll(p, 0); err != nil || n == 0 {
		return false, nil //nolint:nilerr // the loop will tell
	}
	if p[0].Revents&(unix.POLLERR|unix.POLLHUP) == 0 {
		return true, nil
	}
	value, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return true, os.NewSyscallError("getsockopt", err)
	case value != 0:
		return true, os.NewSyscallError("connect", syscall.Errno(value))
	}
	return true, nil // it was, and its peer has gone already: whoever reads will see
}

// await waits until a socket is connected, or is not going to be.
func (l *loop) await(ctx context.Context, fd int) error {
	w := &waiter{ready: make(chan struct{}, 1)}
	number, ok := l.watch(w, wanted, fd)
	if !ok {
		return net.ErrClosed
	}
	defer l.forget(number, fd)
	for {
		select {
		case <-w.ready:
			if ready, err := connected(fd); ready {
				return err
			}
		case <-ctx.Done():
			return ctxError(ctx)
		}
	}
}

// ctxError is what net says at the end of a context: that of a deadline is a timeout.
func ctxError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return os.ErrDeadlineExceeded
	}
	return ctx.Err()
}

// A waiter is a goroutine that waits for a socket of its own.
type waiter struct{ ready chan struct{} }

// serve tells the waiter to look again.
func (w *waiter) serve(int, uint32) {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

func (w *waiter) abort() { w.serve(0, 0) }

func sockaddr(to netip.AddrPort) (family int, name unix.Sockaddr) {
	if addr := to.Addr().Unmap(); addr.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: addr.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// Close closes the connection.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	fd := s.fd
	s.fd = -1
	if errno := rawClose(fd); errno != 0 {
		return os.NewSyscallError("close", errno)
	}
	return nil
}

// SetLinger makes [Abort] a reset.
func (s *socket) SetLinger(sec int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(sec)}) //nolint:gosec // seconds
}

// Control gives the descriptor to f, for options.
func (s *socket) Control(f func(fd int) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return f(s.fd)
}

func (s *socket) Read([]byte) (int, error)  { return 0, errUnjoined }
func (s *socket) Write([]byte) (int, error) { return 0, errUnjoined }

func (s *socket) RemoteAddr() net.Addr             { return net.TCPAddrFromAddrPort(s.to) }
func (s *socket) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *socket) SetDeadline(time.Time) error      { return nil }
func (s *socket) SetReadDeadline(time.Time) error  { return nil }
func (s *socket) SetWriteDeadline(time.Time) error { return nil }
