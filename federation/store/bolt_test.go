package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/raft"
)

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data)}
}

func openLog(t testing.TB, dir string) *bolt {
	t.Helper()
	b, err := openBolt(dir)
	if err == nil {
		err = b.whole([]*raft.SnapshotMeta{{Index: 1 << 40}})
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A logModel is a log beside a list in memory that has what it must have.
type logModel struct {
	*rand.Rand
	t          *testing.T
	dir        string
	b          *bolt
	want       []*raft.Log
	next, term uint64
}

// Whatever raft stores and deletes, and however often the log is opened again,
// which writes it anew, it has what a list in memory has.
func TestLogIsAList(t *testing.T) {
	for seed := range uint64(4) {
		m := &logModel{Rand: rand.New(rand.NewPCG(3, seed)), t: t, dir: dataDir(t), next: 1, term: 1}
		m.b = openLog(t, m.dir)
		for range 200 {
			if err := m.step(); err != nil {
				t.Fatal(err)
			}
			m.check()
		}
		if err := m.b.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func (m *logModel) step() error {
	first, _ := m.b.FirstIndex() // raft asks for it too before it deletes
	switch n := m.IntN(20); {
	case n < 14:
		var batch []*raft.Log
		for range 1 + m.IntN(40) {
			batch = append(batch, entry(m.next, m.term, fmt.Sprintf(`{"n":%d,"pad":"%s"}`, m.next, strings.Repeat("x", m.IntN(400)))))
			m.next++
		}
		m.want = append(m.want, batch...)
		return m.b.StoreLogs(batch)
	case n < 16 && len(m.want) > 2: // a new leader does not have the last ones
		k := len(m.want) - 1 - m.IntN(2)
		from := m.want[k].Index
		err := m.b.DeleteRange(from, m.next-1)
		m.term++
		m.next, m.want = from, m.want[:k]
		return err
	case n == 16 && len(m.want) > 10: // a snapshot was taken
		to := m.want[m.IntN(len(m.want)-1)].Index
		m.want = m.want[to+1-m.want[0].Index:]
		return m.b.DeleteRange(first, to)
	case n == 17 && len(m.want) > 0: // a snapshot came from the leader
		err := m.b.DeleteRange(first, m.next-1)
		m.next += uint64(m.IntN(50))
		m.want = nil
		return err
	case n == 18:
		return m.b.SetUint64([]byte("CurrentTerm"), m.term)
	}
	err := m.b.close()
	m.b = openLog(m.t, m.dir)
	return err
}

func (m *logModel) check() {
	m.t.Helper()
	first, _ := m.b.FirstIndex()
	last, _ := m.b.LastIndex()
	var wantFirst, wantLast uint64
	if len(m.want) > 0 {
		wantFirst, wantLast = m.want[0].Index, m.want[len(m.want)-1].Index
	}
	if first != wantFirst || last != wantLast {
		m.t.Fatalf("it has %d to %d, want %d to %d", first, last, wantFirst, wantLast)
	}
	for _, w := range m.want {
		l := raft.Log{}
		if err := m.b.GetLog(w.Index, &l); err != nil || l.Index != w.Index || l.Term != w.Term || !reflect.DeepEqual(l.Data, w.Data) {
			m.t.Fatalf("entry %d is %+v, want %+v: %v", w.Index, l, w, err)
		}
	}
	var l raft.Log
	for _, i := range []uint64{0, first - 1, last + 1} {
		if err := m.b.GetLog(i, &l); !errors.Is(err, raft.ErrLogNotFound) {
			m.t.Fatalf("entry %d: %v", i, err)
		}
	}
}

// After a sync that has failed, what was written for it is read as if it were on the
// disk. Wherever the power is cut later on, nothing that was acknowledged is lost.
func TestFailedSyncThenPowerCut(t *testing.T) {
	needTap(t)
	cuts := 0
	for off := true; off; {
		cuts++
		dir := dataDir(t)
		d := newDisk(dir)
		if err := os.Mkdir(filepath.Join(dir, "raft"), 0o700); err != nil {
			t.Fatal(err)
		}
		b := openLog(t, filepath.Join(dir, "raft"))
		var next, acked uint64 = 1, 0
		store := func() error {
			var batch []*raft.Log
			for range 20 {
				batch = append(batch, entry(next, 1, fmt.Sprintf(`{"pad":"%0400d"}`, next)))
				next++
			}
			err := b.safely(func() error { return b.StoreLogs(batch) })
			if err == nil {
				acked = next - 1
			}
			return err
		}
		for range 8 {
			if err := store(); err != nil {
				t.Fatal(err)
			}
		}
		d.failSync(2) // the first is for the entries, this for what leads to them
		if err := store(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("have %v", err)
		}
		_ = b.close()
		d.cutAfter(cuts)
		var err error
		if b, err = openBolt(filepath.Join(dir, "raft")); err == nil {
			next, _ = b.LastIndex()
			next++
			for range 3 {
				if store() != nil {
					break
				}
			}
		}
		if b != nil {
			_ = b.close()
		}
		off = d.isOff()
		d.powerOff()
		d.powerOn()
		b = openLog(t, filepath.Join(dir, "raft"))
		if last, err := b.LastIndex(); err != nil || last < acked {
			t.Fatalf("cut %d: it ends with entry %d, and %d was acknowledged: %v", cuts, last, acked, err)
		}
		if err := b.close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the power was cut at %d calls", cuts-1)
}

// A second process is kept out, and told why.
func TestFolderIsLocked(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.start()
		register(t, numbered(1), n)
		want := "the store cannot use " + n.o.DataDir + "/raft: " + n.o.DataDir + "/raft/lock is locked: another culvert uses this data_dir"
		for range 2 {
			if _, err := Open(n.o); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("have %v", err)
			}
		}
		register(t, numbered(2), n)
		info, err := os.Stat(filepath.Join(n.o.DataDir, "raft", boltName))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("the log's mode is %v: %v", info.Mode(), err)
		}
	})
}
