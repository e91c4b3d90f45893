//go:build !linux

package store

import "errors"

type tap struct{}

func (*tap) add(*testDisk) {}

func newTap() (*tap, error) { return nil, errors.New("not on this system") }
