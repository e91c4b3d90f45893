package sockopt

import (
	"errors"
	"fmt"
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

func dialOptions(fd int) error {
	_, err := capRTO(fd)
	return err
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
