package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"culvert/test/lab"
)

const (
	mtu = 1500
	// virtioHeader precedes each packet: what is left to do for its checksum
	// (struct virtio_net_hdr). It is handed on as it is.
	virtioHeader = 10
	// deviceQueue is how many packets a device keeps for us.
	deviceQueue = 32768
	// batch is how many packets are taken in before those that are due are
	// looked at again.
	batch = 64
	// grain is the least time from one wake-up to the next. Each costs ten packets'
	// work in a virtual machine, where it is the hypervisor's to set timers and
	// to wake processors; with much traffic many packets share one.
	grain = 200 * time.Microsecond
	// priority is what threads run with under SCHED_FIFO: the lowest there is
	// passes everything that is no such thread.
	priority = 1
)

// A way is one direction of a link: its thread alone touches line and store.
type way struct {
	host          *lab.Host // whose packets it takes in
	in, out, wake int
	setting       atomic.Pointer[Way]
	counts        tallies
	thread        atomic.Int64
	line          line
	store         store
}

// openTUN makes the device on a host. It goes when the descriptor is closed.
func openTUN(h *lab.Host) (int, error) {
	var fd int
	err := h.Do(func() (err error) {
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(Device)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err == nil {
			err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM)
		}
		return err
	})
	if err == nil {
		_, err = h.Run("ip", "link", "set", Device, "mtu", fmt.Sprint(mtu), "txqueuelen", fmt.Sprint(deviceQueue))
	}
	if err != nil && fd > 0 {
		closeFD(fd)
	}
	return fd, err
}

func closeFD(fd int) { _ = unix.Close(fd) } // of a device or an eventfd: nothing is left to be written

func newWake() (int, error) { return unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC) }

func ring(wake int) error {
	_, err := unix.Write(wake, binary.NativeEndian.AppendUint64(nil, 1))
	return err
}

// run carries packets until it is woken. It tells by ready whether it has the
// priority that it needs, and runs either way.
func (w *way) run(ready chan<- error) {
	err := foremost()
	w.thread.Store(int64(unix.Gettid()))
	ready <- err
	began := time.Now()
	poll := []unix.PollFd{{Fd: int32(w.in), Events: unix.POLLIN}, {Fd: int32(w.wake), Events: unix.POLLIN}}
	woken := time.Duration(0)
	for {
		more := w.takeIn(began)
		w.handOut(int64(time.Since(began)))
		w.counts.waiting.Store(uint64(len(w.line.queue)))
		if more {
			continue
		}
		if early := woken + grain - time.Since(began); early > 0 {
			t := unix.NsecToTimespec(int64(early))
			_, _ = unix.Ppoll(poll[1:], &t, nil)
		}
		var timeout *unix.Timespec // nil: for ever
		if due, ok := w.line.next(); ok {
			t := unix.NsecToTimespec(int64(wait(due, int64(time.Since(began)))))
			timeout = &t
		}
		if _, err := unix.Ppoll(poll, timeout, nil); err != nil && !errors.Is(err, unix.EINTR) {
			panic(fmt.Sprintf("netlab: ppoll: %v", err)) // of arguments that are always the same
		}
		if poll[1].Revents != 0 {
			return
		}
		woken = time.Since(began)
	}
}

// foremost gives the goroutine a thread of its own that runs before all others.
// The thread ends with it, as it is for nothing else.
func foremost() error {
	runtime.LockOSThread()
	err := unix.SchedSetAttr(0, &unix.SchedAttr{
		Size: uint32(unsafe.Sizeof(unix.SchedAttr{})), Policy: unix.SCHED_FIFO, Priority: priority, Flags: unix.SCHED_FLAG_RESET_ON_FORK,
	}, 0)
	if err != nil {
		return fmt.Errorf("run a thread under SCHED_FIFO: %w", err)
	}
	return nil
}

// takeIn takes in what waits at the near end, and tells whether more may wait.
func (w *way) takeIn(began time.Time) (more bool) {
	setting := w.setting.Load()
	for range batch {
		slot, room := w.store.take()
		if !room {
			return w.skip()
		}
		n, errno := transfer(unix.SYS_READ, w.in, w.store.at(slot))
		if errno != 0 {
			w.store.give(slot)
			return false // nothing waits
		}
		size := n - virtioHeader
		due, f := w.line.admit(setting, int64(time.Since(began)), size)
		switch f {
		case lost:
			w.counts.lost.Add(1)
			w.store.give(slot)
		case queueFull:
			w.counts.full.Add(1)
			w.store.give(slot)
		case arrives:
			w.line.push(due, slot, n)
		}
	}
	return true
}

// transfer reads or writes without telling the runtime, as neither waits: to come
// back from a call that the runtime knows of, a thread may have to wait for
// locks that threads without its priority hold.
func transfer(call uintptr, fd int, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(n), errno
}

// skip reads a packet that there is no room for.
func (w *way) skip() bool {
	var b [1]byte // too short for its header: the packet is thrown away (EINVAL)
	if _, errno := transfer(unix.SYS_READ, w.in, b[:]); errno == unix.EAGAIN {
		return false
	}
	w.counts.missed.Add(1)
	return true
}

// handOut hands the packets that are due to the far end.
func (w *way) handOut(now int64) {
	for {
		due, ok := w.line.next()
		if !ok || due > now {
			return
		}
		p := w.line.pop()
		if _, errno := transfer(unix.SYS_WRITE, w.out, w.store.at(int(p.slot))[:p.size]); errno != 0 {
			w.counts.refused.Add(1)
		} else {
			w.counts.passed.Add(1)
			w.counts.bytes.Add(uint64(p.size - virtioHeader))
		}
		w.store.give(int(p.slot))
	}
}

// threadCPU reads the clock of a thread's processor time (what
// pthread_getcpuclockid(3) makes of its number).
func threadCPU(thread int) (time.Duration, error) {
	const perThread, sched = 4, 2
	var t unix.Timespec
	err := unix.ClockGettime(int32(^thread<<3|perThread|sched), &t)
	return time.Duration(t.Nano()), err
}
