package store

import (
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// theTap is TestMain's, nil with a reason where there is none.
var (
	theTap *tap
	errTap error
)

// A call changes a file, or makes it safe.
type call struct {
	kind         string
	path         string
	file         string // the file's name while it is open, "" for a rename
	offset, size int64
	data         []byte
}

// A testDisk is a data folder whose calls may fail, and that loses at a crash what
// was not synced. It is of no effect where calls cannot be seen.
type testDisk struct {
	dir string
	// writes are transactions of the log: those to its first two pages.
	syncs, resizes, writes atomic.Int64

	mu     sync.Mutex
	random *rand.Rand
	count  int
	at     int   // the call that fails, 0 for none
	offAt  int   // the call before which the power is cut, likewise
	syncAt int64 // the sync that fails
	broken bool  // no more can be written
	dead   bool
	hit    string // the kind of the one that failed
	slow   chan struct{}
	images []*image
}

// An image is what is on the disk of a file, and where it has been written since.
type image struct {
	file  os.FileInfo
	data  []byte
	dirty map[int64]bool // pages
}

const pageSize = 4096

func newDisk(dir string) *testDisk {
	d := &testDisk{dir: dir, random: rand.New(rand.NewPCG(4, 4))}
	if theTap != nil {
		theTap.add(d)
	}
	return d
}

// needTap skips a test where calls cannot be seen.
func needTap(t *testing.T) {
	t.Helper()
	if errTap == nil {
		return
	}
	if os.Getenv("CULVERT_E2E") == "require" {
		t.Fatalf("CULVERT_E2E=require: calls cannot be made to fail: %v", errTap)
	}
	t.Skipf("calls cannot be made to fail: %v", errTap)
}

func (d *testDisk) setBroken(broken bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = broken
}

// failedKind tells what kind of call has failed.
func (d *testDisk) failedKind() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hit
}

// failSync makes a sync fail: 1 is the next one.
func (d *testDisk) failSync(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncAt = d.syncs.Load() + n
}

// cutAfter cuts the power at a call: 1 is the next one. It is on again with powerOn.
func (d *testDisk) cutAfter(calls int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.offAt = d.count + calls
}

// isOff tells whether the power was cut.
func (d *testDisk) isOff() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dead
}

// hold makes syncs wait until release is called.
func (d *testDisk) hold() (release func()) {
	c := make(chan struct{})
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = c
	return func() { close(c) }
}

// decide is told of each call before it is done.
func (d *testDisk) decide(c call) (fails syscall.Errno, wait <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.kind == "sync" {
		wait = d.slow
	}
	return d.judge(c), wait
}

func (d *testDisk) judge(c call) syscall.Errno {
	if d.dead {
		return syscall.EIO
	}
	d.count++
	if d.count == d.offAt {
		d.dead = true
		return syscall.EIO
	}
	fails := d.broken && c.kind == "write" || d.count == d.at
	if d.count == d.at {
		d.hit = c.kind
	}
	isLog := strings.HasPrefix(filepath.Base(c.path), boltName)
	switch c.kind {
	case "sync":
		fails = d.syncs.Add(1) == d.syncAt || fails
	case "resize":
		d.resizes.Add(1)
	case "write":
		if c.offset < 2*pageSize && c.size == pageSize {
			d.writes.Add(1)
		}
	}
	if isLog && c.file != "" {
		d.note(c, fails)
	}
	switch {
	case !fails:
		return 0
	case c.kind == "sync", c.kind == "fsync":
		return syscall.EIO
	}
	return syscall.ENOSPC
}

// note keeps the image of a file. A write that fails has written half. What a sync
// fails for is still read, and never on the disk.
func (d *testDisk) note(c call, fails bool) {
	info, err := os.Stat(c.file)
	if err != nil {
		panic(err)
	}
	im := d.image(info)
	if im == nil {
		im = &image{file: info, dirty: make(map[int64]bool)}
		d.images = append(d.images, im)
	}
	if info.Size() == 0 { // an inode that is used again
		im.data = nil
		clear(im.dirty)
	}
	switch c.kind {
	case "write":
		size := c.size
		if fails {
			size /= 2
			writeHalf(c.file, c.offset, c.data[:size])
		}
		for p := c.offset / pageSize; p*pageSize < c.offset+size; p++ {
			im.dirty[p] = true
		}
	case "sync", "fsync":
		if !fails {
			im.settle(c.file, func() bool { return true })
		}
		clear(im.dirty)
	case "resize":
		if !fails {
			im.data = append(im.data, make([]byte, max(0, c.size-int64(len(im.data))))...)
		}
	}
}

func (d *testDisk) image(file os.FileInfo) *image {
	for _, im := range d.images {
		if os.SameFile(im.file, file) {
			return im
		}
	}
	return nil
}

// settle takes over pages from the file.
func (im *image) settle(file string, which func() bool) {
	f, err := os.Open(file)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	for _, p := range slices.Sorted(maps.Keys(im.dirty)) {
		if !which() {
			continue
		}
		page := make([]byte, pageSize)
		n, _ := f.ReadAt(page, p*pageSize)
		im.data = append(im.data, make([]byte, max(0, p*pageSize+int64(n)-int64(len(im.data))))...)
		copy(im.data[p*pageSize:], page[:n])
	}
}

// writeHalf writes by other means than those that are watched.
func writeHalf(file string, offset int64, data []byte) {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Seek(offset, 0)
	}
	if err == nil {
		_, err = f.Write(data)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		panic(err)
	}
}

// powerOff makes all calls fail.
func (d *testDisk) powerOff() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
}

// powerOn makes of the log what is on the disk: of what was not synced some pages
// and others not, as the kernel may have got round to them.
func (d *testDisk) powerOn() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.dead {
		return
	}
	d.dead, d.offAt, d.syncAt = false, 0, 0
	names, _ := filepath.Glob(filepath.Join(d.dir, "raft", boltName+"*"))
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			panic(err)
		}
		im := d.image(info)
		if im == nil {
			continue
		}
		im.settle(name, func() bool { return d.random.IntN(2) == 0 })
		clear(im.dirty)
		if err := os.WriteFile(name, im.data, 0o600); err != nil {
			panic(err)
		}
	}
}
