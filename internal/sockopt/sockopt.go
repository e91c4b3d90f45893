// Package sockopt sets the TCP options that decide how soon a connection
// notices that its path is dead, and how soon it uses a path that has come back.
//
//	d := net.Dialer{Control: sockopt.Control}
//	c, err := d.DialContext(ctx, "tcp", address)
//	...
//	err = sockopt.Packet(c.(*net.TCPConn))
//
// TCP doubles its retransmission timeout up to two minutes while a path drops
// everything in silence, so the first byte after the path's return may wait as
// long again as the path was away. Linux 6.15 and later can cap that timeout for
// one socket (TCP_RTO_MAX_MS, one second at the least); where it can, an
// established connection is in use again about a second after its path. Where it
// cannot, a packet connection is given up after [PacketTimeoutUncapped] instead,
// so that its owner dials a new one.
//
// The functions may be called from several goroutines; they hold nothing. On
// other systems than Linux only keepalive and TCP_NODELAY are set.
package sockopt

import (
	"fmt"
	"net"
	"syscall"
	"time"
)

// The values that [Packet] and [Stream] set.
const (
	// RTOMax is the cap on the retransmission timeout: the least that Linux
	// takes.
	RTOMax = time.Second
	// PacketTimeout is how long sent bytes may stay unacknowledged on a packet
	// connection (TCP_USER_TIMEOUT, RFC 5482) where RTOMax is in force.
	PacketTimeout = 10 * time.Second
	// PacketTimeoutUncapped is the same where the kernel knows no RTOMax: a
	// fourth retransmission is out by then, and the fifth would be too late.
	PacketTimeoutUncapped = 3 * time.Second
	// PacketUnsent is how many bytes may wait unsent in the kernel
	// (TCP_NOTSENT_LOWAT). Gossip that waits is better dropped by its queue,
	// which knows its age, than kept by a kernel, which does not.
	PacketUnsent = 16 << 10
	// StreamTimeout is TCP_USER_TIMEOUT for streams. It outlasts a blackout of
	// half a minute, which a plainly routed connection would have outlasted. It
	// also ends a connection whose reader keeps its window shut as long.
	StreamTimeout = 60 * time.Second
)

// Packet prepares c for gossip packets: no delay, dead within
// [PacketTimeout] whether it is silent or not, and little waiting unsent.
func Packet(c *net.TCPConn) error {
	if err := c.SetNoDelay(true); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	// The user timeout decides, not the count: Linux gives up at the first
	// probe after it (tcp_keepalive_timer). The count is for other systems.
	return apply(c, net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 5}, packetOptions)
}

// Stream prepares c for a stream, which may be silent for hours and must live
// through that: dead peers are found by keepalive after about a minute.
func Stream(c *net.TCPConn) error {
	return apply(c, net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}, streamOptions)
}

// Control is for [net.Dialer]: it caps the retransmission timeout before the
// connection is made, so that SYNs too are sent at least once a second.
func Control(_, _ string, c syscall.RawConn) error {
	return control(c, dialOptions)
}

func apply(c *net.TCPConn, keepalive net.KeepAliveConfig, options func(fd int) error) error {
	if err := c.SetKeepAliveConfig(keepalive); err != nil {
		return fmt.Errorf("set keepalive: %w", err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("reach socket: %w", err)
	}
	return control(raw, options)
}

func control(c syscall.RawConn, options func(fd int) error) error {
	var inner error
	if err := c.Control(func(fd uintptr) { inner = options(int(fd)) }); err != nil {
		return fmt.Errorf("reach socket: %w", err)
	}
	return inner
}
