package alpn

import (
	"os"

	"golang.org/x/sys/unix"
)

const canTry = true

// tryWrite writes to a socket that does not block; again is whether it is full.
func tryWrite(fd uintptr, p []byte) (n int, again bool, err error) {
	return try("write", unix.Write, fd, p)
}

// tryRead reads from a socket that does not block; again is whether it is empty.
func tryRead(fd uintptr, p []byte) (n int, again bool, err error) {
	return try("read", unix.Read, fd, p)
}

func try(name string, call func(int, []byte) (int, error), fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err := call(int(fd), p)
		switch err {
		case nil:
			return n, false, nil
		case unix.EINTR: //nolint:errorlint // an errno as it is
			continue
		case unix.EAGAIN:
			return 0, true, nil
		}
		return 0, false, os.NewSyscallError(name, err)
	}
}
