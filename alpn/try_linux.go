package alpn

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const canTry = true

// tryWrite writes to a socket that does not block; again is whether it is full.
func tryWrite(fd uintptr, p []byte) (n int, again bool, err error) {
	return try("write", unix.SYS_WRITE, fd, p)
}

// tryRead reads from a socket that does not block; again is whether it is empty.
func tryRead(fd uintptr, p []byte) (n int, again bool, err error) {
	return try("read", unix.SYS_READ, fd, p)
}

// try makes a system call that takes some microseconds. To tell Go's scheduler of it,
// as it does for others, would wake its monitor thread, which sleeps while nothing
// goes on: for a packet now and then that costs more than the call.
func try(name string, call, fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, _, errno := unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p))) //nolint:gosec // as rule 4 of package unsafe has it
		switch errno {
		case 0:
			return int(n), false, nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return 0, true, nil
		}
		return 0, false, os.NewSyscallError(name, errno)
	}
}
