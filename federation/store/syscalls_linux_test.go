package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A tap is asked about each call of this process that changes a file at a place
// or makes it safe, before the kernel does it: bbolt writes to a file of the
// operating system alone, and this is how it is seen and made to fail there.
// It is a seccomp filter that hands calls to whoever listens.
type tap struct {
	listener int
	memory   *os.File // of this process, where paths and data of calls are

	mu    sync.Mutex
	disks map[string]*testDisk // by folder
}

// tapped are the calls, with the names that tests have for them.
var tapped = map[int32]string{
	unix.SYS_PWRITE64: "write", unix.SYS_FDATASYNC: "sync", unix.SYS_FSYNC: "fsync",
	unix.SYS_FTRUNCATE: "resize", unix.SYS_RENAMEAT: "rename",
}

// notification is struct seccomp_notif, and answer struct seccomp_notif_resp.
type (
	notification struct {
		id         uint64
		pid, flags uint32
		nr         int32
		arch       uint32
		ip         uint64
		args       [6]uint64
	}
	answer struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

// newTap puts the filter upon all threads, for as long as this process lives.
func newTap() (*tap, error) {
	t := &tap{disks: make(map[string]*testDisk)}
	var err error
	if t.memory, err = os.Open("/proc/self/mem"); err != nil {
		return nil, err
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the call's number
	for nr := range tapped {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(nr)},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if os.Geteuid() != 0 {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return nil, err
		}
	}
	// A call that was handed over is not interrupted: it would come twice.
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC |
		unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return nil, fmt.Errorf("seccomp: %w", errno)
	}
	t.listener = int(fd)
	// Whose call is looked at and who looks take turns, so they may share a processor.
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
	if errno != 0 && !errors.Is(errno, unix.EINVAL) { // since Linux 6.6
		return nil, fmt.Errorf("seccomp: %w", errno)
	}
	go t.listen()
	return t, nil
}

func (t *tap) listen() {
	for {
		var n notification
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(t.listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
		if errno == 0 {
			t.answer(&n)
		} else if !errors.Is(errno, unix.EINTR) && !errors.Is(errno, unix.ENOENT) {
			panic(fmt.Sprint("listen to calls: ", errno))
		}
	}
}

func (t *tap) answer(n *notification) {
	errno, wait := t.decide(n)
	if wait == nil {
		t.send(n.id, errno)
		return
	}
	go func() {
		<-wait
		t.send(n.id, errno)
	}()
}

func (t *tap) send(id uint64, fails syscall.Errno) {
	a := answer{id: id, errno: -int32(fails)}
	if fails == 0 {
		a.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(t.listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a)))
	if errno != 0 && !errors.Is(errno, unix.ENOENT) {
		panic(fmt.Sprint("answer a call: ", errno))
	}
}

// decide returns what a call is to fail with, 0 if it is not to, and what it waits
// for before, if it does.
func (t *tap) decide(n *notification) (fails syscall.Errno, wait <-chan struct{}) {
	c := call{kind: tapped[n.nr], offset: int64(n.args[3]), size: int64(n.args[2])}
	var err error
	switch c.kind {
	case "rename":
		c.path, err = t.text(n.args[3])
	case "resize":
		c.size = int64(n.args[1])
		fallthrough
	default:
		c.file = fmt.Sprintf("/proc/self/fd/%d", n.args[0])
		c.path, err = os.Readlink(c.file)
	}
	if err != nil {
		panic(fmt.Sprint("look at a call: ", err))
	}
	d := t.disk(c.path)
	if d == nil {
		return 0, nil
	}
	if c.kind == "write" {
		c.data = make([]byte, c.size)
		if _, err := t.memory.ReadAt(c.data, int64(n.args[1])); err != nil {
			panic(fmt.Sprint("read what is written: ", err))
		}
	}
	return d.decide(c)
}

func (t *tap) add(d *testDisk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.disks[d.dir] = d
}

func (t *tap) disk(path string) *testDisk {
	t.mu.Lock()
	defer t.mu.Unlock()
	for dir, d := range t.disks {
		if strings.HasPrefix(path, dir+"/") {
			return d
		}
	}
	return nil
}

// text reads a string that ends with a zero.
func (t *tap) text(at uint64) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := t.memory.ReadAt(b, int64(at)) // it may end within a page that is not there
	text, _, ok := bytes.Cut(b[:n], []byte{0})
	if !ok {
		return "", errors.Join(err, errors.New("a path has no end"))
	}
	return string(text), nil
}
