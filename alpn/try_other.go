//go:build !linux

package alpn

const canTry = false

func tryWrite(uintptr, []byte) (n int, again bool, err error) { return 0, true, nil }

func tryRead(uintptr, []byte) (n int, again bool, err error) { return 0, true, nil }
