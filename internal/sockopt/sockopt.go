// Package sockopt sets the TCP options that decide how soon a connection
// notices that its path is dead, and how soon it uses a path that has come back.
//
//	d := net.Dialer{Control: sockopt.StreamControl, KeepAlive: -1}
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
	// SilentFor is how long a connection that sends nothing costs its listener no
	// more than what the kernel keeps of it.
	SilentFor = 10 * time.Second
)

// Packet prepares c for gossip packets: no delay, dead within
// [PacketTimeout] whether it is silent or not, and little waiting unsent.
func Packet(c *net.TCPConn) error { return packet(c, capRTO) }

// packet is Packet with a limit on the retransmission timeout that reports
// whether it is in force.
func packet(c *net.TCPConn, limit func(fd int) (capped bool, err error)) error {
	if err := c.SetNoDelay(true); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	capped := false
	err := apply(c, func(fd int) (err error) {
		if capped, err = limit(fd); err != nil {
			return err
		}
		return packetOptions(fd, packetTimeout(capped))
	})
	if err != nil {
		return err
	}
	return keepAlive(c, packetKeepAlive(capped))
}

func packetTimeout(capped bool) time.Duration {
	if capped {
		return PacketTimeout
	}
	return PacketTimeoutUncapped
}

// packetKeepAlive leaves room for probes to be lost. The user timeout decides,
// not the count: Linux gives up at the first probe that is due after it, counted
// from what was last received (tcp_keepalive_timer), so a first probe that comes
// later than the timeout would be the only one. The count is for other systems.
func packetKeepAlive(capped bool) net.KeepAliveConfig {
	k := net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 5}
	if !capped {
		k.Idle = time.Second // probes after one and two seconds, the end after three
	}
	return k
}

// StreamSocket is [Stream] for a TCP socket that is not connected, or is. It caps the
// retransmission timeout before a connection is made, so that SYNs too are sent at
// least once a second.
func StreamSocket(fd int) error { return streamSetup(fd) }

// StreamListener is [StreamSocket] for a socket that is to listen, where whoever dials
// speaks first: the kernel keeps a connection back until then, [SilentFor] at the least
// (TCP_DEFER_ACCEPT).
func StreamListener(fd int) error {
	if err := deferAccept(fd, SilentFor); err != nil {
		return err
	}
	return streamSetup(fd)
}

// PacketSocket is [Packet] for a TCP socket. TCP_NODELAY is not touched.
func PacketSocket(fd int) error { return packetSetup(fd) }

// StreamControl is [StreamSocket] for [net.Dialer] and [net.ListenConfig]. What a
// listener accepts has the options of the listener, and needs no call for each
// connection. Their own keepalive must be off (KeepAlive: -1), or it would be set
// anew.
func StreamControl(_, _ string, c syscall.RawConn) error {
	return control(c, streamSetup)
}

// Stream prepares c for a stream, which may be silent for hours and must live
// through that: dead peers are found by keepalive after about a minute.
func Stream(c *net.TCPConn) error {
	if err := apply(c, streamOptions); err != nil {
		return err
	}
	return keepAlive(c, streamKeepAlive)
}

//nolint:gochecknoglobals // a constant
var streamKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

func keepAlive(c *net.TCPConn, k net.KeepAliveConfig) error {
	if err := c.SetKeepAliveConfig(k); err != nil {
		return fmt.Errorf("set keepalive: %w", err)
	}
	return nil
}

func apply(c *net.TCPConn, options func(fd int) error) error {
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
