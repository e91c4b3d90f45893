package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
)

const (
	boltName = "raft.db"
	// boltWait bounds how long bbolt waits for its own lock. Nobody else has
	// it: the folder is locked.
	boltWait = 100 * time.Millisecond
)

// anew is what to do about a folder that cannot be used. A voter that forgets
// what it has voted for and acknowledged must not be one meanwhile.
const anew = "restore the folder, or have another server remove this one (culvert federation remove-peer), remove the folder and start it again"

var errDamaged = errors.New("the log is damaged: " + anew)

// A bolt is raft's log and its votes in a file of bbolt.
type bolt struct {
	*raftboltdb.BoltStore
	file   *os.File
	spoilt atomic.Bool // something has panicked: bbolt may hold locks of its own for ever
}

// openBolt opens the log in dir to write to it, and makes it first if there is
// none. If it can be read and not be written to, it is returned with the error.
func openBolt(dir string) (*bolt, error) {
	path := filepath.Join(dir, boltName)
	err := renew(path)
	if err == nil {
		var b *bolt
		if b, err = openStore(path, false); err == nil {
			return b, nil
		}
		err = written(err)
	}
	if lasting(err) {
		return nil, err
	}
	b, readErr := openStore(path, true)
	if readErr != nil {
		return nil, err
	}
	return b, err
}

func openStore(path string, readOnly bool) (*bolt, error) {
	b := &bolt{}
	err := b.safely(func() (err error) {
		b.BoltStore, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{
			Timeout: boltWait, NoStatistics: true, ReadOnly: readOnly,
			OpenFile: func(path string, flag int, mode os.FileMode) (f *os.File, err error) {
				b.file, err = os.OpenFile(path, flag, mode)
				return b.file, err
			},
		}})
		return err
	})
	if err != nil && b.spoilt.Load() {
		err = errors.Join(err, b.close())
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// close must not be called before all other calls have returned.
func (b *bolt) close() error {
	if b.spoilt.Load() {
		return errors.Join(unlock(b.file), b.file.Close()) // its mapping stays
	}
	return b.Close()
}

// renew writes the log into a new file that takes its place, or makes an empty one.
// When a sync has failed, the kernel may hold pages that are read as if they were
// on the disk, and are not, and never will be. raft builds upon what is found at
// the start, so it is made sure of.
func renew(path string) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Size() == 0:
		return errDamaged // bbolt would take it for a new one
	case err == nil:
		err = copyBolt(path, info.Size(), next)
	case errors.Is(err, os.ErrNotExist):
		var b *bolt
		if b, err = openStore(next, false); err == nil {
			err = b.close()
		}
	}
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next) // it takes room where there may be none
		return written(err)
	}
	return syncDir(filepath.Dir(path))
}

// copyBolt copies the log in path, of size bytes, to next.
func copyBolt(path string, size int64, next string) (err error) {
	// What is only read is not looked at before it is copied.
	from, err := bbolt.Open(path, 0, &bbolt.Options{ReadOnly: true, Timeout: boltWait})
	if err != nil {
		if lasting(err) {
			err = fmt.Errorf("%w (%w)", errDamaged, err)
		}
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	if err := complete(from, size); err != nil {
		return err
	}
	to, err := bbolt.Open(next, 0o600, &bbolt.Options{Timeout: boltWait})
	if err != nil {
		return err
	}
	err = safely(func() error { return bbolt.Compact(to, from, 0) })
	if f, ok := errors.AsType[faultError](err); ok && !f.within(from, size) {
		err = fmt.Errorf("%w (a page refers to one behind its end)", errDamaged)
	}
	return errors.Join(err, to.Close())
}

// complete makes sure that a file of size bytes has all pages that it says it
// has: bbolt makes it longer before it says so. What is behind the end of the
// mapping belongs to somebody else, and bbolt reads it without a look at where it ends.
func complete(db *bbolt.DB, size int64) error {
	return db.View(func(tx *bbolt.Tx) error {
		if size < tx.Size() {
			return fmt.Errorf("%w (it has %d bytes of %d)", errDamaged, size, tx.Size())
		}
		return nil
	})
}

// A panicError is what safely makes of a panic.
type panicError struct{ error }

func (e panicError) Unwrap() error { return e.error }

// A faultError is what it makes of a page that cannot be read.
type faultError struct{ addr uintptr }

func (faultError) Error() string { return "read a page of the log: " + syscall.EIO.Error() }
func (faultError) Unwrap() error { return syscall.EIO }

// within tells whether it is a page of the file, so that the disk is at fault.
func (e faultError) within(db *bbolt.DB, size int64) bool {
	return e.addr-db.Info().Data < uintptr(size) //nolint:gosec // a file has no negative size
}

// safely makes errors of what bbolt panics at, pages that make no sense, and of
// pages that the disk does not give, for which the kernel would end the process:
// a spoilt log stops the store, and not the sidecar around it.
func safely(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch p := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // a fault
			err = panicError{faultError{p.Addr()}}
		default:
			err = panicError{fmt.Errorf("%w (%v)", errDamaged, p)}
		}
	}()
	return f()
}

// safely is for all that is asked of a log.
func (b *bolt) safely(f func() error) error {
	err := safely(f)
	if _, ok := errors.AsType[panicError](err); ok {
		b.spoilt.Store(true)
	}
	return err
}

// whole makes sure that all entries can be read and make sense, and that the log
// begins where a snapshot ends. raft would panic otherwise, sooner or later: where
// somebody took the snapshots away, for one.
func (b *bolt) whole(snapshots []*raft.SnapshotMeta) error {
	first, err := b.FirstIndex()
	last, err2 := b.LastIndex()
	if err := errors.Join(err, err2); err != nil || last == 0 {
		return err
	}
	for i := first; i <= last; i++ {
		var l raft.Log
		if err := b.GetLog(i, &l); err != nil || l.Index != i || !sensible(&l) {
			return fmt.Errorf("%w (entry %d)", errDamaged, i)
		}
	}
	if first == 1 || slices.ContainsFunc(snapshots, func(s *raft.SnapshotMeta) bool { return s.Index+1 >= first }) {
		return nil
	}
	return fmt.Errorf("its log begins with entry %d, and no snapshot holds what was before: %s", first, anew)
}

// sensible keeps out what only damage can have made, configurations that raft
// panics at among it.
func sensible(l *raft.Log) (ok bool) {
	switch l.Type {
	case raft.LogCommand:
		return json.Valid(l.Data)
	case raft.LogConfiguration:
		defer func() { ok = recover() == nil }()
		raft.DecodeConfiguration(l.Data)
	}
	return l.Type <= raft.LogConfiguration
}

// unbegin makes the beginning of a store, if a crash has cut it short, one that
// has not been: raft writes its first term before its first entry, and takes a
// folder that has the one alone for one in use. Without an entry and without a
// vote nothing was said to anybody that must not be forgotten.
func (b *bolt) unbegin() error {
	last, err := b.LastIndex()
	if err != nil || last > 0 {
		return err
	}
	term, err := b.GetUint64([]byte("CurrentTerm"))
	_, voteErr := b.GetUint64([]byte("LastVoteTerm"))
	if err != nil || term == 0 || voteErr == nil {
		return nil // a key that is not there is an error
	}
	return b.SetUint64([]byte("CurrentTerm"), 0)
}
