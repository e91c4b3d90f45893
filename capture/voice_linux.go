package capture

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"culvert/capture/ruleset"
)

// A voice is a socket that hands packets to the local server in the names of
// peers: it sends from their addresses, which are other hosts' (ip(7),
// IP_TRANSPARENT), and is marked as one that may. Nothing is read from it, and so
// it is none of those that the runtime waits for: each packet sent would wake the
// waiting. It may be used from many goroutines.
type voice struct {
	socket
	port uint16 // that it sends from
}

// openVoice opens one on any port but those that are taken, as the server's are
// before it runs. It takes CAP_NET_ADMIN.
func openVoice(v6 bool, taken map[uint16]bool) (*voice, error) {
	for {
		v, err := newVoice(v6)
		if err != nil || !taken[v.port] {
			return v, err
		}
		defer v.close() // no sooner, so that the next one gets another port
	}
}

func newVoice(v6 bool) (_ *voice, err error) {
	domain, level, transparent, wildcard := unix.AF_INET, unix.IPPROTO_IP, unix.IP_TRANSPARENT, unix.Sockaddr(&unix.SockaddrInet4{})
	if v6 {
		domain, level, transparent, wildcard = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, &unix.SockaddrInet6{}
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	for _, option := range [][3]int{
		{level, transparent, 1},
		{unix.SOL_SOCKET, unix.SO_MARK, ruleset.Mark},
		{unix.SOL_SOCKET, unix.SO_SNDBUF, udpBuffer},
		{unix.SOL_SOCKET, unix.SO_RCVBUF, 0}, // what comes is not read; the kernel makes it the least there is
	} {
		if err := unix.SetsockoptInt(fd, option[0], option[1], option[2]); err != nil {
			return nil, fmt.Errorf("let a socket send from peers' addresses: %w", os.NewSyscallError("setsockopt", err))
		}
	}
	if v6 {
		if err := unix.SetsockoptInt(fd, level, unix.IPV6_V6ONLY, 1); err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, wildcard); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	v := &voice{socket: socket{fd: fd}}
	switch at := at.(type) {
	case *unix.SockaddrInet4:
		v.port = uint16(at.Port) //nolint:gosec // a port
	case *unix.SockaddrInet6:
		v.port = uint16(at.Port) //nolint:gosec // a port
	}
	return v, nil
}
