package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// udpBuffer is what is asked of the kernel for each packet endpoint: enough
// for a burst of gossip while the process is not scheduled.
const udpBuffer = 1 << 20

func listenPacket(at netip.AddrPort) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: freebind}
	pc, err := lc.ListenPacket(context.Background(), "udp"+family(at.Addr()), at.String())
	if err != nil {
		return nil, systemError(err)
	}
	c := pc.(*net.UDPConn) //nolint:errcheck // "udp4" and "udp6" give nothing else
	_ = c.SetReadBuffer(udpBuffer)
	_ = c.SetWriteBuffer(udpBuffer) // both best effort: the kernel has its own maximum
	return c, nil
}

func listenStream(at netip.AddrPort) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: freebind}
	ln, err := lc.Listen(context.Background(), "tcp"+family(at.Addr()), at.String())
	if err != nil {
		return nil, systemError(err)
	}
	return ln.(*net.TCPListener), nil //nolint:errcheck // "tcp4" and "tcp6" give nothing else
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// freebind lets an IPv6 socket take an address that is local by an AnyIP route
// (ip -6 route add local PREFIX dev lo) and on no interface. IPv4 needs no such
// thing. Because it also lets a socket take an address that nothing routes
// here, checkLocal comes first.
func freebind(network, _ string, rc syscall.RawConn) error {
	if network != "udp6" && network != "tcp6" {
		return nil
	}
	var serr error
	if err := rc.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
	}); err != nil {
		return err
	}
	return serr
}

// systemError strips the layers that net puts around the system's error: who
// calls has named the address already.
func systemError(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}

// checkLocal asks the kernel whether it delivers what is sent to addr to this
// host itself (rtnetlink(7), RTM_GETROUTE, type RTN_LOCAL). It returns
// EADDRNOTAVAIL if not.
func checkLocal(addr netip.Addr) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("ask for the route to %s: %w", addr, err)
	}
	defer func() { _ = unix.Close(fd) }()
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	if err := unix.Sendto(fd, routeRequest(addr), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask for the route to %s: %w", addr, err)
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return fmt.Errorf("read the route to %s: %w", addr, err)
	}
	const typeOffset = unix.SizeofNlMsghdr + 7 // rtm_type in struct rtmsg
	if n <= typeOffset {
		return fmt.Errorf("read the route to %s: %d bytes of answer", addr, n)
	}
	// No route at all is an NLMSG_ERROR: not ours either.
	if binary.NativeEndian.Uint16(buf[4:]) != unix.RTM_NEWROUTE || buf[typeOffset] != unix.RTN_LOCAL {
		return unix.EADDRNOTAVAIL
	}
	return nil
}

func routeRequest(addr netip.Addr) []byte {
	ip := addr.AsSlice()
	fam := byte(unix.AF_INET6)
	if addr.Is4() {
		fam = unix.AF_INET
	}
	size := unix.SizeofNlMsghdr + unix.SizeofRtMsg + unix.SizeofRtAttr + len(ip)
	b := make([]byte, 0, size)
	b = binary.NativeEndian.AppendUint32(b, uint32(size)) //nolint:gosec // 60 at the most
	b = binary.NativeEndian.AppendUint16(b, unix.RTM_GETROUTE)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, 8)...)                                          // sequence and port: one question, one answer
	b = append(b, fam, byte(addr.BitLen()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)      //nolint:gosec // 32 or 128
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(ip))) //nolint:gosec // 20 at the most
	b = binary.NativeEndian.AppendUint16(b, unix.RTA_DST)
	return append(b, ip...)
}
