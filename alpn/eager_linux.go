package alpn

import (
	"os"

	"golang.org/x/sys/unix"
)

const canTry = true

// tryWrite writes to a socket that does not block; again is whether it is full.
func tryWrite(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err := unix.Write(int(fd), p)
		switch err {
		case nil:
			return n, false, nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return 0, true, nil
		}
		return 0, false, os.NewSyscallError("write", err)
	}
}
