package store

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hashicorp/raft"
)

// A DiskError is why nothing can be written. What is in memory can be read all
// the while, and the store opens its files again every few seconds.
type DiskError struct {
	Path string // the folder
	Err  error
}

func (e *DiskError) Error() string {
	var cause syscall.Errno
	if !errors.As(e.Err, &cause) {
		return fmt.Sprintf("the store cannot use %s: %v; it tries again by itself", e.Path, e.Err)
	}
	remedy := "look at the disk"
	switch cause {
	case syscall.ENOSPC, syscall.EDQUOT:
		remedy = "make room"
	case syscall.EROFS, syscall.EACCES, syscall.EPERM:
		remedy = "make it writable"
	case syscall.ENOENT, syscall.ENOTDIR:
		remedy = "make the folder, or mount it"
	}
	return fmt.Sprintf("the store cannot write to %s: %v: %s; it starts again by itself", e.Path, cause, remedy)
}

func (e *DiskError) Unwrap() error { return e.Err }

// A guard stands before raft's log and votes. hashicorp/raft panics on some
// writes and reads that fail, and goes on after others. Here the first failure
// cuts this node off before raft hears of it, so that no vote, no acknowledgement
// and no entry leaves that is not on the disk; whatever is asked after it fails as
// well; and raft is told what keeps it from panicking until it is shut down.
type guard struct {
	path string
	cut  func() // closes all connections and takes no more; it returns when that is done

	once   sync.Once
	err    atomic.Pointer[DiskError]
	failed chan struct{}

	logs   raft.LogStore
	stable raft.StableStore
	safely func(func() error) error
}

func newGuard(path string, cut func()) *guard {
	return &guard{path: path, cut: cut, failed: make(chan struct{}), safely: func(f func() error) error { return f() }}
}

// failure returns what fail has set, nil before.
func (g *guard) failure() error {
	if err := g.err.Load(); err != nil {
		return err
	}
	return nil
}

// fail notes the first failure and returns it. When it returns nothing leaves
// this node any more, whoever called it first.
func (g *guard) fail(err error) error {
	g.once.Do(func() {
		g.err.Store(&DiskError{Path: g.path, Err: err})
		g.cut()
		close(g.failed)
	})
	return g.failure()
}

// StoreLog implements [raft.LogStore].
func (g *guard) StoreLog(l *raft.Log) error { return g.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements [raft.LogStore].
func (g *guard) StoreLogs(ls []*raft.Log) error {
	return g.write(func() error { return g.logs.StoreLogs(ls) })
}

// DeleteRange implements [raft.LogStore].
func (g *guard) DeleteRange(first, last uint64) error {
	return g.write(func() error { return g.logs.DeleteRange(first, last) })
}

// Set implements [raft.StableStore].
func (g *guard) Set(key, value []byte) error {
	return g.write(func() error { return g.stable.Set(key, value) })
}

// SetUint64 implements [raft.StableStore]. raft panics where its term cannot be
// saved, so it is not told: it is cut off by then.
func (g *guard) SetUint64(key []byte, value uint64) error {
	err := g.write(func() error { return g.stable.SetUint64(key, value) })
	if string(key) == "CurrentTerm" && g.failure() != nil {
		return nil
	}
	return err
}

func (g *guard) write(f func() error) error {
	if err := g.failure(); err != nil {
		return err
	}
	if err := g.safely(f); err != nil {
		return g.fail(written(err))
	}
	return nil
}

// A writeError is one of bbolt that has lost its number: where bbolt cannot make
// its file longer it keeps the text alone.
type writeError struct{ error }

func (e writeError) Unwrap() error { return e.error }

func written(err error) error {
	cause := syscall.Errno(0)
	if err == nil || errors.As(err, &cause) || errors.Is(err, errDamaged) {
		return err
	}
	return writeError{err}
}

// lasting tells whether trying again is of no use, for all that is known of an
// error: it is not the operating system's.
func lasting(err error) bool {
	cause := syscall.Errno(0)
	_, write := errors.AsType[writeError](err)
	return !write && !errors.As(err, &cause)
}

// read is for what raft takes a refusal of.
func read[T any](g *guard, f func() (T, error)) (value T, err error) {
	if err := g.failure(); err != nil {
		return value, err
	}
	err = g.safely(func() (err error) {
		value, err = f()
		return err
	})
	return value, err
}

// Get implements [raft.StableStore].
func (g *guard) Get(key []byte) ([]byte, error) {
	return read(g, func() ([]byte, error) { return g.stable.Get(key) })
}

// GetUint64 implements [raft.StableStore].
func (g *guard) GetUint64(key []byte) (uint64, error) {
	return read(g, func() (uint64, error) { return g.stable.GetUint64(key) })
}

// FirstIndex implements [raft.LogStore].
func (g *guard) FirstIndex() (uint64, error) { return read(g, g.logs.FirstIndex) }

// LastIndex implements [raft.LogStore].
func (g *guard) LastIndex() (uint64, error) { return read(g, g.logs.LastIndex) }

// IsMonotonic implements [raft.MonotonicLogStore]: after a snapshot from the
// leader raft deletes all entries rather than leave a hole.
func (g *guard) IsMonotonic() bool { return true }

// GetLog implements [raft.LogStore]. raft panics where it cannot read an entry that
// is to be applied, so it is given one that does nothing: it is cut off by then.
func (g *guard) GetLog(index uint64, l *raft.Log) error {
	err := g.failure()
	if err == nil {
		err = g.safely(func() error { return g.logs.GetLog(index, l) })
		if err == nil || errors.Is(err, raft.ErrLogNotFound) {
			return err
		}
		_ = g.fail(err)
	}
	*l = raft.Log{Index: index, Type: raft.LogNoop}
	return nil
}
