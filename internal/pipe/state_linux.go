package pipe

import (
	"net"

	"golang.org/x/sys/unix"
)

// stateClosed is TCP_CLOSE of the kernel's tcp_states.h: no connection (any
// more). A reset leads to it, and so do the ends of both sides.
const stateClosed = 7

// awaitReset waits on a connection that has been read to its end, and reports
// whether it was reset, or found dead. It returns false when its read deadline
// passes or it is closed. It reads nothing.
func awaitReset(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	reset := false
	err = raw.Read(func(fd uintptr) bool {
		soerr, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		reset = err == nil && soerr != 0
		return reset || err != nil
	})
	return err == nil && reset
}

// isClosed reports whether there is no connection any more.
func isClosed(c *net.TCPConn) bool {
	i := info(c)
	return i != nil && i.State == stateClosed
}

// isFlushed reports whether nothing written is on its way still. What could not
// be found out counts as flushed.
func isFlushed(c *net.TCPConn) bool {
	i := info(c)
	return i == nil || i.State == stateClosed || i.Unacked == 0 && i.Notsent_bytes == 0
}

// info returns TCP_INFO, nil for a closed descriptor.
func info(c *net.TCPConn) *unix.TCPInfo {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	var i *unix.TCPInfo
	cerr := raw.Control(func(fd uintptr) { i, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if cerr != nil || err != nil {
		return nil
	}
	return i
}
