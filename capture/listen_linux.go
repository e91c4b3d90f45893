package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// udpBuffer is what is asked of the kernel for each packet endpoint: enough
// for a burst of gossip while the process is not scheduled.
const udpBuffer = 1 << 20

func listenStream(at netip.AddrPort) (*net.TCPListener, error) {
	return listenStreamBy(&net.ListenConfig{Control: freebind}, at)
}

func listenStreamBy(lc *net.ListenConfig, at netip.AddrPort) (*net.TCPListener, error) {
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
// here, iproute.Local comes first.
func freebind(network, _ string, rc syscall.RawConn) error {
	if network != "udp6" && network != "tcp6" {
		return nil
	}
	return setsockopt(rc, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1) })
}

// systemError strips the layers that net puts around the system's error: who
// calls has named the address already.
func systemError(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}

// listenPacketAny opens a socket for every endpoint at once. Each datagram tells
// which it was for (ip(7), IP_PKTINFO; ipv6(7), IPV6_RECVPKTINFO).
func listenPacketAny(at netip.AddrPort, p *batches) (*net.UDPConn, *inlet, error) {
	lc := net.ListenConfig{Control: func(network, address string, rc syscall.RawConn) error {
		return errors.Join(freebind(network, address, rc), setsockopt(rc, func(fd int) error {
			if at.Addr().Is6() {
				return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			}
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}))
	}}
	pc, err := lc.ListenPacket(context.Background(), "udp"+family(at.Addr()), at.String())
	if err != nil {
		return nil, nil, systemError(err)
	}
	c := pc.(*net.UDPConn) //nolint:errcheck // "udp4" and "udp6" give nothing else
	_ = c.SetReadBuffer(udpBuffer)
	_ = c.SetWriteBuffer(udpBuffer) // both best effort: the kernel has its own maximum
	in, err := newInlet(c, p)
	if err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return c, in, nil
}

func setsockopt(rc syscall.RawConn, set func(fd int) error) error {
	var err error
	if cerr := rc.Control(func(fd uintptr) { err = set(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// sourceControl is the control message that makes a datagram come from an
// address.
func sourceControl(a netip.Addr) []byte {
	if a.Is4() {
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.As4()})
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: a.As16()})
}

// controlSize is enough for the control messages of a datagram.
const controlSize = 64

// destination is the address that a datagram was for, from its control messages;
// the zero Addr if they do not tell.
func destination(control []byte) netip.Addr {
	for len(control) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(control)
		switch {
		case err != nil:
			return netip.Addr{}
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(data[8:12])) // ipi_addr
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(data[:16])) // ipi6_addr
		}
		control = rest
	}
	return netip.Addr{}
}
