package alpn

import (
	"errors"
	"net"
	"sync"
	"syscall"
)

// maxPending bounds what an eager writer keeps for its peer, in bytes. Whoever
// writes to one waits for its Flush before the next write, so it holds one record
// as a rule, and beside it only what crypto/tls writes by itself: alerts, and
// answers to key updates, which a peer that reads nothing could ask for without end.
const maxPending = 256 << 10

var errPending = errors.New("the peer does not read, and asks for more")

// An eager is a TCP connection whose writes do not wait: what the socket does not
// take at once is kept until flush, in order. So whoever writes to many peers can
// do so itself, without a goroutine for each that might be stuck.
type eager struct {
	raw net.Conn
	rc  syscall.RawConn
	try func(fd uintptr) bool // attempt, bound once

	mu       sync.Mutex
	p        []byte // being written by attempt
	n        int    // of p, written
	err      error
	kept     []byte // not taken by the socket yet
	flushing bool   // part of kept is in flush's hands
	failed   error  // of flush: a part of a record may be out
}

// newEager returns nil for what is no socket, or none whose writes can be tried.
func newEager(raw net.Conn) *eager {
	tcp, ok := raw.(*net.TCPConn)
	if !ok || !canTry {
		return nil
	}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	e := &eager{raw: raw, rc: rc}
	e.try = e.attempt
	return e
}

// write takes all of p, unless there is an error.
func (e *eager) write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failed != nil {
		return 0, e.failed
	}
	if len(e.kept) > 0 || e.flushing {
		if len(e.kept)+len(p) > maxPending {
			return 0, errPending
		}
		e.kept = append(e.kept, p...)
		return len(p), nil
	}
	e.p, e.n, e.err = p, 0, nil
	err := e.rc.Write(e.try)
	e.p = nil
	if err == nil {
		err = e.err
	}
	if err != nil {
		return e.n, err
	}
	e.kept = append(e.kept, p[e.n:]...)
	return len(p), nil
}

// attempt writes as much of p as the socket takes. Called by write, with mu held.
func (e *eager) attempt(fd uintptr) bool {
	for e.n < len(e.p) && e.err == nil {
		n, again, err := tryWrite(fd, e.p[e.n:])
		e.n += n
		e.err = err
		if again {
			break
		}
	}
	return true // never wait
}

func (e *eager) pending() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.kept) > 0 || e.flushing
}

// flush waits until all is out, or the write deadline passes, which leaves the
// connection of no use. It is for one goroutine at a time.
func (e *eager) flush() error {
	for {
		e.mu.Lock()
		out := e.kept
		e.kept, e.flushing = nil, len(out) > 0
		e.mu.Unlock()
		if len(out) == 0 {
			return nil
		}
		if _, err := e.raw.Write(out); err != nil {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.failed = err
			return err
		}
	}
}
