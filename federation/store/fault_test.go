package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/federation/state"
)

// faultyFiles fail one write, or all for a while. A write that fails has written
// half; what a sync fails for is lost.
type faultyFiles struct {
	osFiles
	mu     sync.Mutex
	count  int
	at     int // the write that fails, 0 for none
	broken bool
	hit    string
}

func (f *faultyFiles) fails(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if f.count == f.at {
		f.hit = what
	}
	return f.broken || f.count == f.at
}

func (f *faultyFiles) setBroken(broken bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = broken
}

func (f *faultyFiles) Replace(dir, name string, data []byte) error {
	if f.fails("replace " + filepath.Ext(name)) {
		return &os.PathError{Op: "write", Path: name, Err: syscall.ENOSPC}
	}
	return f.osFiles.Replace(dir, name, data)
}

func (f *faultyFiles) Append(dir, name string) (appender, error) {
	if f.fails("open") {
		return nil, syscall.EMFILE
	}
	a, err := f.osFiles.Append(dir, name)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name)
	info, err := os.Stat(path)
	return &faultyFile{a, f, path, info.Size()}, err
}

type faultyFile struct {
	appender
	disk *faultyFiles
	path string
	good int64
}

func (f *faultyFile) Write(p []byte) (int, error) {
	if f.disk.fails("write") {
		n, _ := f.appender.Write(p[:len(p)/2])
		return n, syscall.ENOSPC
	}
	return f.appender.Write(p)
}

func (f *faultyFile) Sync() error {
	if f.disk.fails("sync") {
		return errors.Join(syscall.EIO, os.Truncate(f.path, f.good))
	}
	info, err := os.Stat(f.path)
	f.good = info.Size()
	return errors.Join(err, f.appender.Sync())
}

// Whichever write fails, of a store of one and of each of three servers: raft
// does not panic, nothing that was acknowledged is lost, and the store begins
// again by itself.
func TestEachWriteFailsOnce(t *testing.T) {
	for _, size := range []int{1, 3} {
		kinds := make(map[string]int)
		for at := 1; ; at++ {
			var hit string
			t.Run(fmt.Sprintf("%d servers/write %d", size, at), func(t *testing.T) {
				bubble(t, func(t *testing.T, w *world) { hit = failOne(t, w, size, at) })
			})
			if hit == "" {
				break
			}
			kinds[hit]++
			if t.Failed() {
				return
			}
			if testing.Short() {
				at += 7
			}
		}
		t.Logf("%d servers: %v", size, kinds)
		for _, kind := range []string{"replace .json", "replace .log", "open", "write", "sync"} {
			if kinds[kind] == 0 {
				t.Errorf("%d servers: no %q has failed", size, kind)
			}
		}
	}
}

func failOne(t *testing.T, w *world, size, at int) (hit string) {
	t.Helper()
	disk := &faultyFiles{at: at}
	var ns []*node
	for i := range size {
		n := w.add(fmt.Sprintf("n%d", i), size)
		n.o.segment, n.o.snapshotEvery = 1500, 12
		if i == 0 {
			n.o.files = disk
		}
		ns = append(ns, n)
	}
	for _, n := range ns {
		n.start()
	}
	const many = 10
	for i := range many {
		register(t, numbered(i), ns...)
	}
	if size > 1 { // an election, so that votes are written
		leader(t, ns...).stop()
		for _, n := range ns {
			if !n.up {
				n.start()
			}
		}
	}
	eventually(t, time.Minute, "all have the same", func() bool {
		return ns[0].store.current() != nil && same(ns...) && ns[0].store.Status().Error == ""
	})
	for _, n := range ns {
		n.stop()
		n.start()
	}
	leader(t, ns...)
	eventually(t, 30*time.Second, "all have the same after a restart", func() bool { return same(ns...) })
	for i := range many {
		if _, ok := find(ns[0].store.State(), numbered(i)); !ok {
			t.Errorf("registration %d was acknowledged and is lost", i)
		}
	}
	return disk.hit
}

// While the disk does not take writes the store says so, and reads go on.
func TestDiskFails(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		disk := &faultyFiles{}
		n.o.files, n.o.Metrics = disk, NewMetrics(nil)
		n.start()
		register(t, numbered(1), n)
		disk.setBroken(true)
		for range 3 {
			_, err := n.store.Register(t.Context(), numbered(2))
			if d, ok := errors.AsType[*DiskError](err); !ok || !errors.Is(d, syscall.ENOSPC) {
				t.Fatalf("want a DiskError, have %v", err)
			}
			want := "the store cannot write to " + n.o.DataDir + "/raft: no space left on device: make room; it starts again by itself"
			if err.Error() != want {
				t.Fatalf("have %q\nwant %q", err, want)
			}
			if err := n.store.Remove(t.Context(), nil, true); err == nil {
				t.Error("a removal was done")
			}
			if !has(n.store.State(), numbered(1)) || has(n.store.State(), numbered(2)) {
				t.Error("reads have changed")
			}
			sleep(30 * time.Second)
		}
		if st := n.store.Status(); !strings.Contains(st.Error, "make room") || st.Store == "" || st.Leading {
			t.Errorf("status is %+v", st)
		}
		if g := n.store.Greeting(); !g.Begun {
			t.Error("it says that it has not begun")
		}
		if f := testutil.ToFloat64(n.o.Metrics.failures); f != 1 {
			t.Errorf("%v failures are counted, want one", f)
		}
		if f := testutil.ToFloat64(n.o.Metrics.failing); f != 1 {
			t.Error("the gauge does not show it")
		}
		n.stop() // a restart on a full disk still shows what is there
		n.start()
		if _, ok := find(n.store.State(), numbered(1)); !ok {
			t.Error("after a restart nothing can be read")
		}
		disk.setBroken(false)
		began := time.Now()
		register(t, numbered(2), n)
		if d := time.Since(began); d > 20*time.Second {
			t.Errorf("it began again after %v", d)
		}
		sleep(2 * time.Second)
		if st := n.store.Status(); st.Error != "" {
			t.Errorf("status is %+v", st)
		}
	})
}

// A follower whose disk fails is cut off, the others go on, and it catches up
// later, from a snapshot.
func TestFollowersDiskFails(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := []*node{w.add("alice", 3), w.add("amy", 3), w.add("art", 3)}
		disks := make([]*faultyFiles, 3)
		for i, n := range ns {
			disks[i] = &faultyFiles{}
			n.o.files, n.o.segment, n.o.snapshotEvery = disks[i], 4<<10, 30
			n.start()
		}
		first := leader(t, ns...)
		victim := (indexOf(ns, first) + 1) % 3
		register(t, numbered(0), ns...)
		disks[victim].setBroken(true)
		for i := range 200 {
			register(t, numbered(i), first)
		}
		sleep(40 * time.Second) // snapshots are taken
		if has(ns[victim].store.State(), numbered(199)) || ns[victim].store.Status().Error == "" {
			t.Error("it goes on without a disk")
		}
		disks[victim].setBroken(false)
		eventually(t, 30*time.Second, "it has caught up", func() bool { return same(ns...) })
	})
}

func indexOf(ns []*node, n *node) int {
	for i := range ns {
		if ns[i] == n {
			return i
		}
	}
	return -1
}

// An entry that makes no sense is left out, everywhere.
func TestSenselessEntry(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		e := leader(t, ns...).store.current()
		for _, data := range []string{"", "{", `{"at":1}`, `{"register":{}}`, `{"at":"0000-01-01T00:00:00+23:59","critical":[{}]}`, "null"} {
			if err := e.raft.Apply([]byte(data), time.Second).Error(); err != nil {
				t.Fatal(err)
			}
		}
		register(t, numbered(1), ns...)
		eventually(t, 5*time.Second, "all have the same", func() bool { return same(ns...) })
	})
}

// A folder that was damaged is an error with a remedy, and no panic.
func TestDamagedFolder(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"no snapshots": func(dir string) error { return os.RemoveAll(filepath.Join(dir, "raft", "snapshots")) },
		"votes": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "raft", "log", votesName), []byte("x"), 0o600)
		},
		"middle of the log": func(dir string) error {
			return flip(dir, 200)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var o Options
			bubble(t, func(t *testing.T, w *world) {
				n := w.add("alice", 1)
				n.o.snapshotEvery, n.o.segment = 20, 8<<10
				n.start()
				for i := range 100 {
					register(t, numbered(i), n)
				}
				sleep(2 * time.Minute) // for snapshots
				for i := range 10 {
					register(t, numbered(200+i), n)
				}
				n.stop()
				o = n.o
				if err := damage(o.DataDir); err != nil {
					t.Fatal(err)
				}
				if _, err := Open(o); err == nil || !strings.Contains(err.Error(), "remove") {
					t.Errorf("have %v", err)
				}
			})
		})
	}
}

// flip spoils a byte of the log's last file.
func flip(dir string, at int64) error {
	names, err := osFiles{}.List(filepath.Join(dir, "raft", "log"), segmentSuffix)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, "raft", "log", names[len(names)-1]), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{0xff}, at)
	return errors.Join(err, f.Close())
}

// A real file system that is full. It needs root.
func TestFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := mountTmpfs(dir, "4m"); err != nil {
		if os.Getenv("CULVERT_E2E") == "require" {
			t.Fatalf("CULVERT_E2E=require: no file system of its own can be mounted: %v", err)
		}
		t.Skipf("no file system of its own can be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.o.DataDir, n.o.segment = filepath.Join(dir, "culvert"), 64<<10
		if err := os.Mkdir(n.o.DataDir, 0o700); err != nil {
			t.Fatal(err)
		}
		n.start()
		var acked []int
		for i := range 10 {
			register(t, numbered(i), n)
			acked = append(acked, i)
		}
		fill(t, filepath.Join(dir, "ballast"))
		var err error
		for i := 10; i < 500; i++ { // what is left of the last page may do for some
			if _, err = n.store.Register(t.Context(), numbered(i)); err != nil {
				break
			}
			acked = append(acked, i)
		}
		if err == nil || !strings.Contains(err.Error(), "no space left on device: make room") {
			t.Fatalf("a full disk gives %v", err)
		}
		t.Logf("%d acknowledged, then: %v", len(acked), err)
		sleep(time.Minute)
		all := func(s *state.State) bool { return hasAll(s, acked) }
		if !all(n.store.State()) {
			t.Error("reads do not go on")
		}
		n.stop()
		n.start()
		if !all(n.store.State()) {
			t.Error("reads do not go on after a restart")
		}
		if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
			t.Fatal(err)
		}
		register(t, numbered(1000), n)
		if !all(n.store.State()) {
			t.Error("what was acknowledged is lost")
		}
		n.stop()
	})
}

func hasAll(s *state.State, acked []int) bool {
	for _, i := range acked {
		if _, ok := find(s, numbered(i)); !ok {
			return false
		}
	}
	return true
}

// fill writes until nothing more goes in.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{64 << 10, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	_ = f.Close()
}
