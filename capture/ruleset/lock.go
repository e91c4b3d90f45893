package ruleset

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// ErrHeld is a table that a running sidecar holds.
var ErrHeld error = &hinted{
	"a running sidecar holds this table",
	"stop the sidecar first; two of them on one host need different listen ports, on different addresses too: the port names their rules",
}

// A Lock holds a table: at most one process of a network namespace does. It is a
// name in the abstract namespace of Unix sockets (unix(7)), which the kernel gives
// back when its process ends, however that does.
type Lock struct{ ln *net.UnixListener }

// Hold takes the table of the sidecar that listens on a port. The error is
// [ErrHeld] where somebody has it.
func Hold(listen uint16) (*Lock, error) {
	ln, err := net.ListenUnix("unix", lockName(listen))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %w", Name(listen), ErrHeld)
	}
	if err != nil {
		return nil, fmt.Errorf("hold table %s: %w", Name(listen), err)
	}
	return &Lock{ln}, nil
}

// Release gives the table back. A nil Lock holds nothing.
func (l *Lock) Release() {
	if l != nil {
		_ = l.ln.Close()
	}
}

// IsHeld tells whether a running sidecar holds the table of a listen port. It
// takes nothing itself.
func IsHeld(listen uint16) bool {
	c, err := net.DialUnix("unix", nil, lockName(listen))
	if err == nil {
		_ = c.Close()
	}
	return !errors.Is(err, syscall.ECONNREFUSED)
}

func lockName(listen uint16) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: "@" + Name(listen)}
}
