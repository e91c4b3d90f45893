package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/bbolt"

	"culvert/federation/state"
)

// Whichever call fails of those that write, of a store of one and of the first of
// three servers: raft does not panic, nothing that was acknowledged is lost, though
// the power is cut in the end, and the store begins again by itself.
func TestEachWriteFailsOnce(t *testing.T) {
	needTap(t)
	for _, size := range []int{1, 3} {
		kinds := make(map[string]int)
		for at := 1; ; at++ {
			var hit string
			t.Run(fmt.Sprintf("%d servers/call %d", size, at), func(t *testing.T) {
				bubble(t, func(t *testing.T, w *world) { hit = failOne(t, w, size, at) })
			})
			if hit == "" {
				break
			}
			kinds[hit]++
			if t.Failed() {
				return
			}
			if testing.Short() || size > 1 {
				at += 4
			}
		}
		t.Logf("%d servers: %v", size, kinds)
		for _, kind := range []string{"write", "sync", "fsync", "resize", "rename"} {
			if kinds[kind] == 0 && size == 1 {
				t.Errorf("%d servers: no %q has failed", size, kind)
			}
		}
	}
}

func failOne(t *testing.T, w *world, size, at int) (hit string) {
	t.Helper()
	var ns []*node
	for i := range size {
		n := w.add(fmt.Sprintf("n%d", i), size)
		n.o.snapshotEvery = 12
		ns = append(ns, n)
	}
	ns[0].disk.at = at
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
		n.kill()
	}
	for _, n := range ns {
		n.start()
	}
	leader(t, ns...)
	eventually(t, 30*time.Second, "all have the same after a restart", func() bool { return same(ns...) })
	for i := range many {
		if _, ok := find(ns[0].store.State(), numbered(i)); !ok {
			t.Errorf("registration %d was acknowledged and is lost", i)
		}
	}
	return ns[0].disk.failedKind()
}

// While the disk does not take writes the store says so, and reads go on.
func TestDiskFails(t *testing.T) {
	needTap(t)
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.o.Metrics = NewMetrics(nil)
		n.start()
		register(t, numbered(1), n)
		n.disk.setBroken(true)
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
		n.disk.setBroken(false)
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
	needTap(t)
	bubble(t, func(t *testing.T, w *world) {
		ns := []*node{w.add("alice", 3), w.add("amy", 3), w.add("art", 3)}
		for _, n := range ns {
			n.o.snapshotEvery = 30
			n.start()
		}
		first := leader(t, ns...)
		victim := (indexOf(ns, first) + 1) % 3
		register(t, numbered(0), ns...)
		ns[victim].disk.setBroken(true)
		for i := range 200 {
			register(t, numbered(i), first)
		}
		sleep(40 * time.Second) // snapshots are taken
		if has(ns[victim].store.State(), numbered(199)) || ns[victim].store.Status().Error == "" {
			t.Error("it goes on without a disk")
		}
		ns[victim].disk.setBroken(false)
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
	folder := func(name ...string) func(dir string) error {
		return func(dir string) error { return os.RemoveAll(filepath.Join(dir, "raft", filepath.Join(name...))) }
	}
	cut := func(size int64) func(dir string) error {
		return func(dir string) error { return os.Truncate(filepath.Join(dir, "raft", boltName), size) }
	}
	for name, damage := range map[string]func(dir string) error{
		"no snapshots": folder("snapshots"), "no log": folder(boltName), "empty": cut(0), "a page": cut(pageSize),
		"no pages but the first": cut(2 * pageSize), "half": cut(8 * pageSize),
		"no last page": noLastPage, "a page far behind the end": misled,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				o := fullFolder(t, w)
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

// noLastPage takes the last page that is in use away.
func noLastPage(dir string) error {
	path := filepath.Join(dir, "raft", boltName)
	db, err := bbolt.Open(path, 0, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	size := int64(0)
	err = db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil })
	return errors.Join(err, db.Close(), os.Truncate(path, size-pageSize))
}

// misled has the bucket of the entries begin 16 GiB behind the file's beginning.
func misled(dir string) error {
	path := filepath.Join(dir, "raft", boltName)
	db, err := bbolt.Open(path, 0, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	var name, root []byte
	err = db.View(func(tx *bbolt.Tx) error {
		name = []byte("logs")
		root = binary.LittleEndian.AppendUint64(nil, uint64(tx.Bucket(name).Root()))
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	header := append(name, root...) // a leaf has the bucket's first page behind its name
	if !bytes.Contains(data, header) {
		return fmt.Errorf("%s: no bucket %q", path, name)
	}
	astray := binary.LittleEndian.AppendUint64([]byte("logs"), 16<<30/pageSize)
	return os.WriteFile(path, bytes.ReplaceAll(data, header, astray), 0o600)
}

// Wherever a sector is spoilt, a start panics no more than it loses something.
func TestDamagedSectors(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		o := fullFolder(t, w)
		path := filepath.Join(o.DataDir, "raft", boltName)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		refused, unused := 0, 0
		for at := 0; at < len(good); at += 512 {
			if bytes.Count(good[at:at+512], []byte{0}) == 512 {
				continue
			}
			bad := bytes.Clone(good)
			for i := range bad[at : at+512] {
				bad[at+i] = 0xff
			}
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(o)
			if err != nil {
				refused++
				if !strings.Contains(err.Error(), "remove") {
					t.Errorf("sector at %d: %v", at, err)
				}
				continue
			}
			unused++
			lost := 0
			for i := range 110 {
				if _, ok := find(s.State(), numbered(i)); !ok {
					lost++
				}
			}
			s.Close()
			// Without its last beginning a file of bbolt is what it was
			// a transaction ago.
			if lost > 1 || lost == 1 && at >= 2*pageSize {
				t.Fatalf("sector at %d: %d registrations are lost", at, lost)
			}
		}
		if refused < 20 {
			t.Errorf("%d spoilt sectors were noticed", refused)
		}
		t.Logf("%d spoilt sectors are refused, %d hold nothing", refused, unused)
	})
}

// fullFolder is the folder of a store that has taken snapshots.
func fullFolder(t *testing.T, w *world) Options {
	t.Helper()
	n := w.add("alice", 1)
	n.o.snapshotEvery = 20
	n.start()
	for i := range 100 {
		register(t, numbered(i), n)
	}
	sleep(2 * time.Minute)
	for i := range 10 {
		register(t, numbered(100+i), n)
	}
	n.stop()
	return n.o
}

// A page that cannot be read stops the store and not the process, as a read-write
// disk that has lost a part would: here another process has made the file shorter.
func TestPagesCannotBeRead(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		for i := range 200 {
			register(t, numbered(i), ns...)
		}
		first := leader(t, ns...)
		if err := os.Truncate(filepath.Join(first.o.DataDir, "raft", boltName), 2*pageSize); err != nil {
			t.Fatal(err)
		}
		register(t, numbered(200), ns...)
		eventually(t, time.Minute, "the disk is said to have failed", func() bool { return first.store.Status().Error != "" })
		if !has(first.store.State(), numbered(199)) {
			t.Error("reads do not go on")
		}
		t.Log(first.store.Status().Error)
		for i := range 10 {
			register(t, numbered(201+i), ns...)
		}
		sleep(time.Minute)
		if s := first.store.Status().Error; !strings.Contains(s, "remove") {
			t.Errorf("later it says %q", s)
		}
	})
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
		n.o.DataDir = filepath.Join(dir, "culvert")
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
