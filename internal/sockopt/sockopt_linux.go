package sockopt

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

func packetOptions(fd int, timeout time.Duration) error {
	if err := setUserTimeout(fd, timeout); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, PacketUnsent); err != nil {
		return fmt.Errorf("set TCP_NOTSENT_LOWAT: %w", err)
	}
	return nil
}

func streamOptions(fd int) error {
	if _, err := capRTO(fd); err != nil {
		return err
	}
	return setUserTimeout(fd, StreamTimeout)
}

// streamSetup is all that a stream has, in as few calls as it takes.
func streamSetup(fd int) error {
	if err := streamOptions(fd); err != nil {
		return err
	}
	return keepAliveOptions(fd, streamKeepAlive)
}

func deferAccept(fd int, d time.Duration) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, int(d.Seconds())); err != nil {
		return fmt.Errorf("set TCP_DEFER_ACCEPT: %w", err)
	}
	return nil
}

func packetSetup(fd int) error {
	capped, err := capRTO(fd)
	if err == nil {
		err = packetOptions(fd, packetTimeout(capped))
	}
	if err != nil {
		return err
	}
	return keepAliveOptions(fd, packetKeepAlive(capped))
}

// keepAliveOptions sets no count of probes: the user timeout decides.
func keepAliveOptions(fd int, k net.KeepAliveConfig) error {
	for _, o := range [...]struct {
		name              string
		level, opt, value int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle.Seconds())},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval.Seconds())},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			return fmt.Errorf("set %s: %w", o.name, err)
		}
	}
	return nil
}

// capRTO reports whether the kernel has the option: before 6.15 it answers
// ENOPROTOOPT, some sandboxes EOPNOTSUPP or EINVAL.
func capRTO(fd int) (bool, error) {
	err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, int(RTOMax.Milliseconds()))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return false, nil
	}
	return false, fmt.Errorf("set TCP_RTO_MAX_MS: %w", err)
}

func setUserTimeout(fd int, d time.Duration) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds())); err != nil {
		return fmt.Errorf("set TCP_USER_TIMEOUT: %w", err)
	}
	return nil
}
