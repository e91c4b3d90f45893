package config

import (
	"errors"
	"syscall"
)

// A ListenError is an address of the process's own, listen.address or admin.address,
// that could not be bound.
type ListenError struct{ Err error }

func (e *ListenError) Error() string { return e.Err.Error() }
func (e *ListenError) Unwrap() error { return e.Err }

// Hint tells what to do about it.
func (e *ListenError) Hint() string {
	if errors.Is(e.Err, syscall.EACCES) {
		return "a port below 1024 is for root, and for who has CAP_NET_BIND_SERVICE (systemd: AmbientCapabilities=): take another in listen.address (--listen) and admin.address (--admin), or give that"
	}
	return "listen.address (--listen) and admin.address (--admin) must be free addresses of this host; `ss -lntp` tells who has one"
}
