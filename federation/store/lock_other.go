//go:build !unix

package store

import "os"

// lockFile locks nothing here.
func lockFile(path string) (*os.File, error) { return os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) }

func unlock(*os.File) error { return nil }
