package store

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// files is all that the log is written with.
type files interface {
	// List returns the names in dir that end in suffix, in their order.
	List(dir, suffix string) ([]string, error)
	Read(dir, name string) ([]byte, error)
	// Replace makes a file with that content, so that after a crash there is
	// the one before or the new one. When it returns it is on the disk.
	Replace(dir, name string, data []byte) error
	// Append opens a file to write at its end.
	Append(dir, name string) (appender, error)
	Remove(dir, name string) error
}

type appender interface {
	io.WriteCloser
	Sync() error
}

// osFiles are those of the operating system.
type osFiles struct{}

func (osFiles) List(dir, suffix string) ([]string, error) {
	all, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range all {
		if strings.HasSuffix(e.Name(), suffix) {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out, nil
}

func (osFiles) Read(dir, name string) ([]byte, error) { return os.ReadFile(filepath.Join(dir, name)) }

func (osFiles) Replace(dir, name string, data []byte) error {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err != nil {
		_ = os.Remove(path + ".tmp") // it takes room where there may be none
		return err
	}
	return syncDir(dir)
}

func (osFiles) Append(dir, name string) (appender, error) {
	return os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_APPEND, 0)
}

func (osFiles) Remove(dir, name string) error { return os.Remove(filepath.Join(dir, name)) }

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
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
