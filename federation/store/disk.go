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

// snapshots is how many are kept: the last, and one in case it is damaged.
const snapshots = 2

// A disk is where raft keeps what it must not forget.
type disk struct {
	*guard
	snaps raft.SnapshotStore
	bolt  *bolt // nil in memory
	lock  *os.File
}

// openMemory returns a disk that forgets.
func openMemory(g *guard) *disk {
	m := raft.NewInmemStore()
	g.logs, g.stable = m, m
	return &disk{guard: g, snaps: raft.NewInmemSnapshotStore()}
}

// openDisk opens dir, which is made if it is not there. When it could read
// what is there and not write, it returns that along with the error.
func openDisk(dir string, g *guard, log *zap.Logger) (*disk, error) {
	if err := makeDirs(dir); err != nil {
		return nil, err
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	d := &disk{guard: g, lock: lock}
	usable, err := d.open(dir, log)
	if !usable {
		return nil, errors.Join(err, d.close())
	}
	return d, err
}

func (d *disk) open(dir string, log *zap.Logger) (usable bool, err error) {
	if d.snaps, err = openSnapshots(dir, log); err != nil {
		return false, err
	}
	list, err := d.snaps.List()
	if err != nil {
		return false, err
	}
	if _, err := os.Stat(filepath.Join(dir, boltName)); errors.Is(err, os.ErrNotExist) && len(list) > 0 {
		return false, fmt.Errorf("there are snapshots and no %s: %s", boltName, anew)
	}
	b, failure := openBolt(dir)
	if b == nil {
		return false, failure
	}
	d.bolt, d.logs, d.stable, d.safely = b, b, b, b.safely
	if err := b.safely(func() error { return b.whole(list) }); err != nil {
		return false, err
	}
	if failure == nil && len(list) == 0 {
		failure = written(b.safely(b.unbegin))
	}
	return true, failure
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

// close must not be called before raft has ended.
func (d *disk) close() error {
	var err error
	if d.bolt != nil {
		err = d.bolt.close()
	}
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

// makeDirs makes folders, each within the one before, that a crash does not
// take away again.
func makeDirs(dirs ...string) error {
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
