package pipe

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Calls that cannot block go to the kernel without telling the scheduler, which
// would take a processor away from who is long in a call, and wake a thread for it.
// Their errors are errnos, never wrapped.

func rawRead(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))) //nolint:gosec // a descriptor, a slice
	return int(n), errno
}

func rawWrite(fd int, b []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))) //nolint:gosec // as above
	return int(n), errno
}

// rawSplice moves up to n bytes, one of from and to being a pipe.
func rawSplice(from, to, n int) (int, syscall.Errno) {
	moved, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), spliceFlags)
	return int(moved), errno
}

func rawShutdown(fd, how int) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
	return errno
}

func rawClose(fd int) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0)
	return errno
}

// rawEpollWait waits for events at most as long as limit says.
func rawEpollWait(fd int, events []unix.EpollEvent, limit *unix.Timespec) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(events))), //nolint:gosec // as above
		uintptr(len(events)), uintptr(unsafe.Pointer(limit)), 0, 0) //nolint:gosec // as above
	return int(n), errno
}
