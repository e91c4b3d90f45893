package pipe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A socket is a TCP connection for [Relays.Join]. Go's poller does not know it, until
// somebody reads or writes what has to be waited for.
type socket struct {
	remote netip.AddrPort

	mu       sync.Mutex
	fd       int      // -1 when closed
	file     *os.File // has fd, and waits; nil until that is needed
	deadline struct{ read, write time.Time }
}

// Dial connects for [Relays.Join]. setup is called with the socket before it connects.
// What cannot be dialled so, a name or a zone, is dialled by a [net.Dialer] with the
// same setup.
func (r *Relays) Dial(ctx context.Context, address string, setup func(fd int) error) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || to.Addr().Zone() != "" {
		d := net.Dialer{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error { return control(c, setup) }}
		return d.DialContext(ctx, "tcp", address)
	}
	s := &socket{remote: to}
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
	family, name := sockaddr(s.remote)
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

// A listener accepts sockets. It is a file, since a net.Listener waits for nobody but
// itself.
type listener struct {
	file   *os.File
	raw    syscall.RawConn
	addr   net.Addr
	closed atomic.Bool
}

// Listen listens at a host and port for connections that are to be joined: until one
// has to wait it costs no more than its descriptor. setup is called with the socket
// that listens, whose options its connections have.
func Listen(ctx context.Context, address string, setup func(fd int) error) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), setup(fd))
		})
	}}
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	l := &listener{addr: ln.Addr()}
	l.file, err = ln.(*net.TCPListener).File()          //nolint:errcheck,forcetypeassert // "tcp" gives nothing else
	if err = errors.Join(err, ln.Close()); err != nil { // the file is another descriptor
		return nil, err
	}
	if l.raw, err = l.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, l.file.Close())
	}
	return l, nil
}

// Close ends an Accept that waits.
func (l *listener) Close() error {
	if l.closed.Swap(true) {
		return net.ErrClosed
	}
	return l.file.Close()
}

func (l *listener) Addr() net.Addr { return l.addr }

// asNet says of a file's error what net says of its own.
func asNet(err error) error {
	var file *os.PathError
	switch {
	case errors.Is(err, os.ErrClosed):
		return net.ErrClosed
	case errors.As(err, &file):
		return &net.OpError{Op: file.Op, Net: "tcp", Err: file.Err}
	}
	return err
}

// Accept waits for a connection.
func (l *listener) Accept() (net.Conn, error) {
	var fd int
	var from unix.Sockaddr
	var failed error
	err := l.raw.Read(func(listening uintptr) bool {
		for {
			fd, from, failed = unix.Accept4(int(listening), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			switch {
			case errors.Is(failed, syscall.EINTR), errors.Is(failed, syscall.ECONNABORTED): // it went while it waited
			default:
				return !errors.Is(failed, syscall.EAGAIN)
			}
		}
	})
	if err == nil && failed != nil {
		err = os.NewSyscallError("accept4", failed)
	}
	if err != nil && l.closed.Load() {
		err = net.ErrClosed
	}
	if err != nil {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: err}
	}
	return &socket{fd: fd, remote: addrPort(from)}, nil
}

func addrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)) //nolint:gosec // a port
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(a.Addr)
		if a.ZoneId != 0 {
			addr = addr.WithZone(strconv.FormatUint(uint64(a.ZoneId), 10))
		}
		return netip.AddrPortFrom(addr, uint16(a.Port)) //nolint:gosec // a port
	}
	return netip.AddrPort{}
}

// Read reads what has come, or waits.
func (s *socket) Read(p []byte) (int, error) {
	return s.transfer(p, rawRead, (*os.File).Read, &s.deadline.read)
}

// Write writes, and waits for room.
func (s *socket) Write(p []byte) (int, error) {
	n, err := s.transfer(p, rawWrite, (*os.File).Write, &s.deadline.write)
	if err == nil && n < len(p) {
		var rest int
		rest, err = s.Write(p[n:])
		n += rest
	}
	return n, err
}

// transfer tries, and has Go's poller wait where that would block.
func (s *socket) transfer(
	p []byte, try func(int, []byte) (int, syscall.Errno), wait func(*os.File, []byte) (int, error), limit *time.Time,
) (int, error) {
	s.mu.Lock()
	file := s.file
	if file == nil {
		switch n, errno := s.tryOnce(p, try, *limit); {
		case errno == 0 && n == 0 && len(p) > 0:
			s.mu.Unlock()
			return 0, io.EOF
		case errno == 0:
			s.mu.Unlock()
			return n, nil
		case s.fd < 0:
			s.mu.Unlock()
			return 0, net.ErrClosed
		case errno != syscall.EAGAIN && errno != syscall.EINTR:
			s.mu.Unlock()
			return 0, errno
		}
		file = s.wait()
	}
	s.mu.Unlock()
	n, err := wait(file, p)
	return n, asNet(err)
}

// tryOnce asks the kernel, unless it is too late. Called with mu held.
func (s *socket) tryOnce(p []byte, try func(int, []byte) (int, syscall.Errno), limit time.Time) (int, syscall.Errno) {
	if s.fd < 0 || !limit.IsZero() && !time.Now().Before(limit) {
		return 0, syscall.EAGAIN
	}
	return try(s.fd, p)
}

// wait makes the socket known to Go's poller. Called with mu held.
func (s *socket) wait() *os.File {
	s.file = os.NewFile(uintptr(s.fd), "tcp")
	_ = s.file.SetReadDeadline(s.deadline.read) // it is new and a socket: neither fails
	_ = s.file.SetWriteDeadline(s.deadline.write)
	return s.file
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
	if s.file != nil {
		return s.file.Close()
	}
	if errno := rawClose(fd); errno != 0 {
		return os.NewSyscallError("close", errno)
	}
	return nil
}

// SetLinger makes [Abort] a reset.
func (s *socket) SetLinger(sec int) error {
	return s.Control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(sec)}) //nolint:gosec // seconds
	})
}

// CloseWrite half-closes the connection.
func (s *socket) CloseWrite() error {
	return s.Control(func(fd int) error {
		if errno := rawShutdown(fd, unix.SHUT_WR); errno != 0 {
			return os.NewSyscallError("shutdown", errno)
		}
		return nil
	})
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

func (s *socket) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.remote) }

func (s *socket) LocalAddr() net.Addr {
	var local netip.AddrPort
	_ = s.Control(func(fd int) error {
		name, err := unix.Getsockname(fd)
		local = addrPort(name)
		return err
	})
	return net.TCPAddrFromAddrPort(local)
}

func (s *socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *socket) SetReadDeadline(t time.Time) error {
	return s.setDeadline(&s.deadline.read, t, (*os.File).SetReadDeadline)
}

func (s *socket) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(&s.deadline.write, t, (*os.File).SetWriteDeadline)
}

func (s *socket) setDeadline(limit *time.Time, t time.Time, set func(*os.File, time.Time) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	*limit = t
	if s.file != nil {
		return set(s.file, t)
	}
	return nil
}
