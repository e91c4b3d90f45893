package federation

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"culvert/federation/state"
)

func open(t *testing.T, path string) Folder {
	t.Helper()
	f, err := OpenFolder(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestInstance(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	first, err := open(t, path).Process()
	if err != nil || first.Instance == "" || first.Start == "" || first.Instance == first.Start {
		t.Fatalf("%+v, %v", first, err)
	}
	second, err := open(t, path).Process()
	if err != nil || second.Instance != first.Instance || second.Start == first.Start {
		t.Errorf("%+v after %+v, %v", second, first, err)
	}
	for _, name := range []string{path, filepath.Dir(path)} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s is %v, %v", name, info.Mode(), err)
		}
	}
	file := filepath.Join(path, instanceFile)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s is %v, %v", file, info.Mode(), err)
	}
	for _, spoilt := range []string{"", "\n", strings.Repeat("x", maxInstance+1), "a\x00b", "é"} {
		if err := os.WriteFile(file, []byte(spoilt), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := open(t, path).Process()
		again, err2 := open(t, path).Process()
		r := bob()
		r.Server.Process = p
		if err != nil || err2 != nil || p.Instance == "" || p.Instance != again.Instance || r.Check() != nil {
			t.Errorf("with %q: %+v, then %+v, %v, %v", spoilt, p, again, err, r.Check())
		}
	}
	if err := os.WriteFile(file, []byte(" by hand \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := open(t, path).Process(); err != nil || p.Instance != "by hand" {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestNoFolder(t *testing.T) {
	f := open(t, "")
	p, err := f.Process()
	if err != nil || p.Instance != "" || p.Start == "" {
		t.Errorf("%+v, %v", p, err)
	}
	if err := f.Save(stateOf(t, "S", alice())); err != nil {
		t.Error(err)
	}
	if s, err := f.Load(); err != nil || s.Len() != 0 {
		t.Errorf("%v, %v", s, err)
	}
}

func TestFolderFaults(t *testing.T) {
	path := t.TempDir()
	file := filepath.Join(path, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, filepath.Join(file, "x")} {
		if _, err := OpenFolder(p); err == nil || !strings.HasPrefix(err.Error(), "federation.data_dir: ") {
			t.Errorf("%s: %v", p, err)
		}
	}
	if err := os.Mkdir(filepath.Join(path, instanceFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, path).Process(); err == nil || !strings.HasPrefix(err.Error(), "federation.data_dir: ") {
		t.Errorf("an instance that is no file: %v", err)
	}
	if err := os.Mkdir(filepath.Join(path, recordsFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if s, err := open(t, path).Load(); err == nil || s == nil || s.Len() != 0 {
		t.Errorf("records that are no file: %v, %v", s, err)
	}
	f := open(t, path)
	first, second := f.Save(state.New()), f.Save(state.New())
	if first == nil || second == nil || first.Error() != second.Error() {
		t.Errorf("one fault has two texts: %v and %v", first, second)
	}
	if halves, _ := filepath.Glob(filepath.Join(path, ".*")); len(halves) != 0 {
		t.Errorf("left behind: %v", halves)
	}
	f = Folder{filepath.Join(path, "gone")}
	first, second = f.Save(state.New()), f.Save(state.New())
	if first == nil || second == nil || first.Error() != second.Error() || !strings.Contains(first.Error(), recordsFile) {
		t.Errorf("one fault has two texts: %v and %v", first, second)
	}
}

// Whoever reads a file while it is replaced finds the old or the new one.
func TestReplacedAtOnce(t *testing.T) {
	f := open(t, t.TempDir())
	states := []*state.State{stateOf(t, "S", alice()), stateOf(t, "S", alice(), bob(), gw1())}
	if err := f.Save(states[0]); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			s, err := f.Load()
			if err != nil || s.Hash() != states[0].Hash() && s.Hash() != states[1].Hash() {
				t.Errorf("half written: %v", err)
				return
			}
		}
	})
	for i := range 50 {
		if err := f.Save(states[i%2]); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

// What a process that was killed has left half written does not count, and goes.
func TestHalfWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "with [brackets]")
	f := open(t, path)
	if err := f.Save(stateOf(t, "S", alice())); err != nil {
		t.Fatal(err)
	}
	half, other := filepath.Join(path, "."+recordsFile+".123"), filepath.Join(path, ".keep")
	for _, name := range []string{half, other} {
		if err := os.WriteFile(name, []byte(`{"version": 1, "rec`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := f.Load(); err != nil || known(s) != "dc1/alice" {
		t.Errorf("%v", err)
	}
	if _, err := f.Process(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("the half is there still")
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}

// All of a state comes back, what is not shown of it included.
func TestSaveAndLoad(t *testing.T) {
	f := open(t, t.TempDir())
	s := apply(t, stateOf(t, "S", alice(), bob(), gw1()), removal(bob().Key()))
	if err := f.Save(s); err != nil {
		t.Fatal(err)
	}
	got, err := f.Load()
	if err != nil || got.Hash() != s.Hash() || got.Index() != s.Index() || got.Store() != "S" || !got.Departed(bob().Key()) {
		t.Errorf("%v, %v", got, err)
	}
}
