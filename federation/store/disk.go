package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
)

const (
	// segmentSize is how long a file of the log gets, in bytes. The last one
	// is written anew at each start.
	segmentSize = 1 << 20
	// snapshots is how many are kept: the last, and one in case it is damaged.
	snapshots = 2
)

// A disk is where raft keeps what it must not forget.
type disk struct {
	*guard
	snaps   raft.SnapshotStore
	journal *journal // nil in memory
	lock    *os.File
}

// openMemory returns a disk that forgets.
func openMemory(g *guard) *disk {
	m := raft.NewInmemStore()
	g.logs, g.stable = m, m
	return &disk{guard: g, snaps: raft.NewInmemSnapshotStore()}
}

// openDisk opens dir, which is made if it is not there. When it could read
// what is there and not write, it returns that along with the error.
func openDisk(dir string, f files, segmentSize int, g *guard, log *zap.Logger) (*disk, error) {
	logs := filepath.Join(dir, "log")
	if err := makeDirs(dir, logs); err != nil {
		return nil, err
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	d := &disk{guard: g, lock: lock}
	if d.journal, err = readJournal(f, logs, segmentSize); err != nil {
		return nil, errors.Join(err, d.close())
	}
	g.logs, g.stable = d.journal, d.journal
	if d.snaps, err = openSnapshots(dir, log); err != nil {
		return nil, errors.Join(err, d.close())
	}
	if err := d.whole(); err != nil {
		return nil, errors.Join(err, d.close())
	}
	if list, err := d.snaps.List(); err == nil && len(list) == 0 {
		d.journal.unbegin()
	}
	return d, d.journal.begin()
}

func openSnapshots(dir string, log *zap.Logger) (raft.SnapshotStore, error) {
	s, err := raft.NewFileSnapshotStoreWithLogger(dir, snapshots, newHCLog(log.Named("snapshot")))
	if err != nil {
		return nil, err
	}
	// Snapshots that a crash has cut short stay for ever otherwise.
	left, err := filepath.Glob(filepath.Join(dir, "snapshots", "*.tmp"))
	if err != nil {
		return nil, err
	}
	for _, l := range left {
		if strings.HasSuffix(l, ".tmp") {
			err = errors.Join(err, os.RemoveAll(l))
		}
	}
	return s, err
}

// whole makes sure that the log begins where a snapshot ends. raft would panic
// where somebody took the snapshots away.
func (d *disk) whole() error {
	first, err := d.logs.FirstIndex()
	if err != nil || first <= 1 {
		return err
	}
	list, err := d.snaps.List()
	if err != nil {
		return err
	}
	for _, s := range list {
		if s.Index+1 >= first {
			return nil
		}
	}
	return fmt.Errorf("its log begins with entry %d, and no snapshot holds what was before: %s", first, anew)
}

// close must not be called before raft has ended.
func (d *disk) close() error {
	var err error
	if d.journal != nil {
		err = d.journal.close()
	}
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}
