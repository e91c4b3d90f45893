package federation

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"culvert/federation/state"
)

// A Folder keeps what a process has to know when it starts again. The zero one,
// of no path, keeps nothing.
type Folder struct{ path string }

// maxInstance bounds the file of the instance, in bytes.
const maxInstance = 64

// OpenFolder makes a folder if it is not there, for its owner alone. The error
// tells which setting it is about.
func OpenFolder(path string) (Folder, error) {
	if path == "" {
		return Folder{}, nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return Folder{}, fmt.Errorf("federation.data_dir: %w", err)
	}
	return Folder{path}, nil
}

// Process says who a process is that has just started. It also takes away what
// one that was killed has left half written.
func (f Folder) Process() (state.Process, error) {
	f.clean()
	instance, err := f.instance()
	return state.Process{Instance: instance, Start: token()}, err
}

// instance names this installation: it is made once, and the same ever after. It
// is "" where nothing is kept.
func (f Folder) instance() (string, error) {
	if f.path == "" {
		return "", nil
	}
	file := filepath.Join(f.path, instanceFile)
	b, err := os.ReadFile(file)
	name := strings.TrimSpace(string(b))
	switch {
	case err == nil && usableName(name):
		return name, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("federation.data_dir: %w", err)
	}
	name = token()
	return name, f.write(instanceFile, []byte(name+"\n"))
}

// usableName tells whether an instance may be registered: no registration gets
// through with one that somebody has spoilt.
func usableName(name string) bool {
	return name != "" && len(name) <= maxInstance && !strings.ContainsFunc(name, func(c rune) bool { return c < ' ' || c > '~' })
}

// clean removes the halves of files that were being written when a process ended.
func (f Folder) clean() {
	if f.path == "" {
		return
	}
	files, _ := os.ReadDir(f.path) // who writes there will tell
	for _, file := range files {
		if strings.HasPrefix(file.Name(), "."+instanceFile+".") || strings.HasPrefix(file.Name(), "."+recordsFile+".") {
			_ = os.Remove(filepath.Join(f.path, file.Name())) // it takes room, and does no other harm
		}
	}
}

// token is a name that nobody else has.
func token() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // it never fails
	return hex.EncodeToString(b)
}

const (
	instanceFile = "instance"
	recordsFile  = "federation-states.json"
)

// Load returns the state that was kept, and an empty one where there is none.
func (f Folder) Load() (*state.State, error) {
	if f.path == "" {
		return state.New(), nil
	}
	b, err := os.ReadFile(filepath.Join(f.path, recordsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return state.New(), nil
	}
	var s *state.State
	if err == nil {
		s, err = state.Load(b)
	}
	if err != nil {
		return state.New(), fmt.Errorf("%s: %w", filepath.Join(f.path, recordsFile), err)
	}
	return s, nil
}

// Save keeps a state in place of the one that was kept.
func (f Folder) Save(s *state.State) error {
	if f.path == "" {
		return nil
	}
	b, err := s.MarshalJSON()
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	return f.write(recordsFile, b)
}

// write replaces a file: whoever reads it finds the old or the new one, and so
// does who starts after a power failure.
func (f Folder) write(name string, content []byte) error {
	file := filepath.Join(f.path, name)
	err := func() error {
		t, err := os.CreateTemp(f.path, "."+name+".*")
		if err != nil {
			return err
		}
		_, err = t.Write(content)
		err = errors.Join(err, t.Sync(), t.Close())
		if err == nil {
			err = os.Rename(t.Name(), file)
		}
		if err != nil {
			return errors.Join(err, os.Remove(t.Name()))
		}
		d, err := os.Open(f.path)
		if err != nil {
			return err
		}
		return errors.Join(d.Sync(), d.Close())
	}()
	if err != nil {
		return fmt.Errorf("write %s: %w", file, cause(err))
	}
	return nil
}

// cause is an error without the name of the file that is written first: it is
// another one each time, and the same fault is to have the same text.
func cause(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		return l.Err
	}
	return err
}
