package capture

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A socket is one of UDP that does not block, and that the runtime's poller does not
// know: that would have it wake a thread also for each packet that was sent, since
// there is room for the next one. It may be used from many goroutines.
type socket struct {
	mu sync.RWMutex // held for writing by close alone
	fd int          // -1 once it is closed
}

// listenPacket opens a socket on an address.
func listenPacket(at netip.AddrPort) (_ *socket, err error) {
	domain := unix.AF_INET
	if at.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	var local unix.Sockaddr
	if domain == unix.AF_INET {
		local = &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	} else {
		local = &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
		for _, option := range []int{unix.IPV6_V6ONLY, unix.IPV6_FREEBIND} { // see freebind
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, option, 1); err != nil {
				return nil, os.NewSyscallError("setsockopt", err)
			}
		}
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, udpBuffer)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, udpBuffer) // both best effort: the kernel has its own maximum
	if err := unix.Bind(fd, local); err != nil {
		return nil, err
	}
	return &socket{fd: fd}, nil
}

// receive reads what waits, see [batch.receive].
func (s *socket) receive(b *batch) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fd < 0 {
		return 0, net.ErrClosed
	}
	return b.receive(uintptr(s.fd))
}

// send sends packets to an address, from the one that control names, and returns
// how many were sent before the one that the error is about. It does not block,
// allocates nothing and does not keep what it is given.
func (s *socket) send(p *outlets, packets [][]byte, control, to []byte) (sent int, err error) {
	o, used := p.list.Get(), 0
	defer func() { p.put(o, used) }()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fd < 0 {
		return 0, net.ErrClosed
	}
	for sent < len(packets) && err == nil {
		var n int
		loaded := o.load(packets[sent:], to, control)
		used = max(used, loaded)
		n, err = o.send(uintptr(s.fd), loaded)
		sent += n
	}
	return sent, err
}

func (s *socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
		s.fd = -1
	}
}

// sockaddr is an address as the kernel takes it: struct sockaddr_in of ip(7), or
// sockaddr_in6 of ipv6(7).
func sockaddr(a netip.AddrPort) []byte {
	size, family, at := unix.SizeofSockaddrInet4, uint16(unix.AF_INET), 4
	if a.Addr().Is6() {
		size, family, at = unix.SizeofSockaddrInet6, unix.AF_INET6, 8
	}
	b := make([]byte, size)
	binary.NativeEndian.PutUint16(b, family)
	binary.BigEndian.PutUint16(b[2:], a.Port())
	copy(b[at:], a.Addr().AsSlice())
	return b
}
