package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data), AppendedAt: time.Unix(0, int64(index))}
}

func openJournal(t testing.TB, dir string, size int) *journal {
	t.Helper()
	j, err := readJournal(osFiles{}, dir, size)
	if err == nil {
		err = j.begin()
	}
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// A logModel is a journal beside a list in memory that has what it must have.
type logModel struct {
	*rand.Rand
	t          *testing.T
	dir        string
	j          *journal
	want       []*raft.Log
	next, term uint64
}

// Whatever is stored and deleted, and however often it is opened again, the
// journal has what a list in memory has; but for what was deleted at the ends,
// which may be back.
func TestJournalIsALog(t *testing.T) {
	for seed := range uint64(15) {
		m := &logModel{Rand: rand.New(rand.NewPCG(3, seed)), t: t, dir: t.TempDir(), next: 1, term: 1}
		m.j = openJournal(t, m.dir, 600)
		for range 200 {
			if err := m.step(); err != nil {
				t.Fatal(err)
			}
			if len(m.want) > 0 {
				check(t, m.j, m.want)
			}
		}
		if err := m.j.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func (m *logModel) step() error {
	first, _ := m.j.FirstIndex() // raft asks for it too before it deletes
	switch n := m.IntN(20); {
	case n < 14:
		var batch []*raft.Log
		for range 1 + m.IntN(4) {
			batch = append(batch, entry(m.next, m.term, fmt.Sprint("data ", m.next, m.term)))
			m.next++
		}
		m.want = append(m.want, batch...)
		return m.j.StoreLogs(batch)
	case n < 16 && len(m.want) > 2: // a new leader does not have the last ones
		k := len(m.want) - 1 - m.IntN(2)
		from := m.want[k].Index
		err := m.j.DeleteRange(from, m.next-1)
		m.term++
		m.next = from + 1
		instead := entry(from, m.term, "instead") // raft stores at once what takes their place
		m.want = append(m.want[:k], instead)
		return errors.Join(err, m.j.StoreLog(instead))
	case n == 16 && len(m.want) > 10: // a snapshot was taken
		to := m.want[m.IntN(len(m.want)-1)].Index
		m.want = m.want[to+1-m.want[0].Index:]
		return m.j.DeleteRange(first, to)
	case n == 17 && len(m.want) > 0: // a snapshot came from the leader
		err := m.j.DeleteRange(first, m.next-1)
		m.next += uint64(m.IntN(50))
		m.want = nil
		return err
	case n == 18:
		return m.j.SetUint64([]byte("CurrentTerm"), m.term)
	}
	err := m.j.close()
	m.j = openJournal(m.t, m.dir, 600)
	return err
}

func check(t *testing.T, j *journal, want []*raft.Log) {
	t.Helper()
	first, _ := j.FirstIndex()
	last, _ := j.LastIndex()
	if first > want[0].Index || last != want[len(want)-1].Index {
		t.Fatalf("it has %d to %d, want %d to %d", first, last, want[0].Index, want[len(want)-1].Index)
	}
	for _, w := range want {
		var l raft.Log
		if err := j.GetLog(w.Index, &l); err != nil || !reflect.DeepEqual(&l, w) {
			t.Fatalf("entry %d is %+v, want %+v: %v", w.Index, l, w, err)
		}
	}
	var l raft.Log
	for _, i := range []uint64{0, first - 1, last + 1} {
		if err := j.GetLog(i, &l); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
}

// Files are deleted when nothing in them is wanted.
func TestJournalShrinks(t *testing.T) {
	dir := t.TempDir()
	j := openJournal(t, dir, 1000)
	for i := uint64(1); i <= 200; i++ {
		if err := j.StoreLog(entry(i, 1, "0123456789")); err != nil {
			t.Fatal(err)
		}
	}
	many, _ := osFiles{}.List(dir, segmentSuffix)
	if err := j.DeleteRange(1, 190); err != nil {
		t.Fatal(err)
	}
	few, _ := osFiles{}.List(dir, segmentSuffix)
	if len(many) < 8 || len(few) > 2 {
		t.Errorf("%d files became %d", len(many), len(few))
	}
	if err := j.DeleteRange(195, 196); err == nil {
		t.Error("a hole was made")
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
}

// A batch that was cut short, at whatever byte, is left out whole; what was
// before it is there.
func TestJournalCutShort(t *testing.T) {
	dir := t.TempDir()
	j := openJournal(t, dir, 1<<20)
	good := []*raft.Log{entry(1, 1, "one"), entry(2, 1, "two")}
	if err := j.StoreLogs(good); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, j.segments[0].name)
	before, _ := os.ReadFile(name)
	if err := j.StoreLogs([]*raft.Log{entry(3, 1, "three"), entry(4, 1, "four")}); err != nil {
		t.Fatal(err)
	}
	after, _ := os.ReadFile(name)
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	for cut := len(before); cut < len(after); cut++ {
		spoilt := append(bytes.Clone(after[:cut]), bytes.Repeat([]byte{0xaa}, cut%7)...)
		if err := os.WriteFile(name, spoilt, 0o600); err != nil {
			t.Fatal(err)
		}
		j := openJournal(t, dir, 1<<20)
		check(t, j, good)
		if err := j.StoreLog(entry(3, 2, "again")); err != nil {
			t.Fatal(err)
		}
		check(t, j, append(good[:2:2], entry(3, 2, "again")))
		if err := j.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Reading a segment does not panic, and what is read is what is written: the
// whole frames at its beginning.
func FuzzSegment(f *testing.F) {
	for _, seed := range segmentSeeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		logs, whole, err := readSegment(b)
		if err != nil {
			return
		}
		again, n, err := readSegment(b[:whole])
		if err != nil || n != whole || !reflect.DeepEqual(again, logs) {
			t.Fatalf("what is whole is read as %d of %d bytes: %v", n, whole, err)
		}
		if len(logs) == 0 {
			return
		}
		back, n, err := readFrame(appendFrame(nil, logs))
		if err != nil || n == 0 || !reflect.DeepEqual(back, logs) {
			t.Fatalf("written and read again it is another: %v", err)
		}
	})
}

func segmentSeeds() [][]byte {
	one := appendFrame(nil, []*raft.Log{entry(1, 1, "x")})
	conf := raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a@b:1"}}})
	two := appendFrame(bytes.Clone(one), []*raft.Log{{Index: 2, Term: 3, Type: raft.LogConfiguration, Data: conf}, {Index: 3, Term: 3, Extensions: []byte("y")}})
	return [][]byte{{}, one, two, two[:len(two)-1], append(bytes.Clone(two), 0, 0, 0)}
}

func TestSegmentSeeds(t *testing.T) {
	for i, want := range []int{0, 1, 3, 1, 3} {
		if logs, _, err := readSegment(segmentSeeds()[i]); err != nil || len(logs) != want {
			t.Errorf("seed %d has %d entries, want %d: %v", i, len(logs), want, err)
		}
	}
}
