package pipe

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// eventsAtOnce is how many events a loop takes from the kernel at once.
	eventsAtOnce = 128
	// watched is what a loop is told of a connection, once for each change: it
	// reads until there is nothing more. Of room to write it is told as well, once
	// there was none (wanted): most connections are never that full.
	watched = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
	wanted  = watched | unix.EPOLLOUT
	// lingering is how long a loop that moves much waits for more without telling the
	// scheduler, which would wake two threads to wait in its place and one to go on.
	// It keeps a processor that long, and once in parkEvery whatever else is there has
	// its turn. Where there is but one processor no loop does so.
	lingering = time.Millisecond
	parkEvery = 5 * time.Millisecond
)

// A watcher is what a loop tells of events: side is which of its descriptors.
type watcher interface {
	serve(side int, events uint32)
	abort()
}

// Relays joins TCP connections without a goroutine for each: what waits costs its
// descriptors and a few hundred bytes. Some loops do the copying of all of them.
//
// Make one with [NewRelays]. Its methods are for any number of goroutines.
type Relays struct {
	wg      sync.WaitGroup
	loops   []*loop // never empty
	next    atomic.Uint32
	spliced *atomic.Int64
}

// A loop waits for events of its relays and serves them. The epoll(7) instance is
// a descriptor that the runtime's own poller watches, so that no thread waits.
type loop struct {
	epoll *os.File
	raw   syscall.RawConn
	fd    int

	mu     sync.Mutex
	slots  []slot
	free   []int32
	closed bool

	// Of the loop's goroutine alone.
	events [eventsAtOnce]unix.EpollEvent
	again  []turn // that go on
	spare  []turn // the memory of those that have
	bulk   bool   // something was moved through a pipe since the last wait
	parked time.Time
	alone  bool // there was one processor then
	buf    *[worthAPipe]byte
}

// A turn is a side of a relay that may have more to hand on.
type turn struct {
	relay *relay
	side  int
}

// A slot is a watcher's number, by which the kernel knows it. An event that was
// taken before a watcher's end is not the next one's: the use differs.
type slot struct {
	watcher watcher
	use     int32
}

// NewRelays starts loops: one for each processor that they are to use. Close ends them.
// Bytes that pass through kernel pipes, which are those of bulk transfers, are added to
// spliced.
func NewRelays(loops int, spliced *atomic.Int64) (*Relays, error) {
	r := &Relays{spliced: spliced}
	for range max(1, loops) {
		l, err := newLoop()
		if err != nil {
			r.Close()
			return nil, err
		}
		r.loops = append(r.loops, l)
		r.wg.Go(l.run)
	}
	return r, nil
}

func newLoop() (*loop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // else os.NewFile would not have it watched
	}
	if err != nil {
		return nil, fmt.Errorf("watch connections: %w", err)
	}
	l := &loop{epoll: os.NewFile(uintptr(fd), "epoll"), fd: fd, buf: new([worthAPipe]byte)}
	if l.raw, err = l.epoll.SyscallConn(); err != nil {
		_ = l.epoll.Close()
		return nil, fmt.Errorf("watch connections: %w", err)
	}
	return l, nil
}

// Close aborts what is still joined and ends the loops. Nothing may be joined any
// more by then.
func (r *Relays) Close() {
	for _, l := range r.loops {
		for _, left := range l.close() {
			left.abort()
		}
	}
	r.wg.Wait()
}

// Join copies from each connection to the other until both have ended, as the
// function [Join] does, and returns at once. It owns both. When it is done with
// them it calls done, from any goroutine, once; done must not block.
//
// The function that it returns aborts both, if they are not at their end. They
// must not be closed otherwise.
func (r *Relays) Join(a, b net.Conn, o Options, done func(Result)) (abort func()) {
	j := newRelay(r, r.loop(), a, b, o, done)
	if j.begin(o.First) {
		return j.abort
	}
	o.First = slices.Clone(o.First)
	r.wg.Go(func() { done(Join(a, b, o)) }) // the kernel watches no more, or they are no sockets
	return func() { Abort(a); Abort(b) }
}

// loop returns each in turn.
func (r *Relays) loop() *loop { return r.loops[r.next.Add(1)%uint32(len(r.loops))] } //nolint:gosec // processors are few

// watch has the kernel tell a watcher of events of its descriptors, and reports false
// where that is not possible. The first may come at once.
func (l *loop) watch(w watcher, events uint32, fds ...int) (number int32, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, false
	}
	if n := len(l.free); n > 0 {
		number = l.free[n-1]
		l.free = l.free[:n-1]
	} else {
		number = int32(len(l.slots)) //nolint:gosec // fewer than descriptors
		l.slots = append(l.slots, slot{})
	}
	s := &l.slots[number]
	s.watcher = w
	for side, fd := range fds {
		e := unix.EpollEvent{Events: events, Fd: number<<1 | int32(side), Pad: s.use}
		if err := unix.EpollCtl(l.fd, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
			for _, fd := range fds[:side] {
				_ = unix.EpollCtl(l.fd, unix.EPOLL_CTL_DEL, fd, nil)
			}
			l.drop(number)
			return 0, false
		}
	}
	return number, true
}

// change has the kernel tell of other events: at once of those that there are by now.
func (l *loop) change(number int32, side, fd int, events uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	e := unix.EpollEvent{Events: events, Fd: number<<1 | int32(side), Pad: l.slots[number].use} //nolint:gosec // 0 or 1
	_ = unix.EpollCtl(l.fd, unix.EPOLL_CTL_MOD, fd, &e)                                         // it is there, and takes no memory
}

// drop gives a slot away. Called with mu held.
func (l *loop) drop(number int32) {
	s := &l.slots[number]
	s.watcher = nil
	s.use++
	l.free = append(l.free, number)
}

// forget ends a watch. The kernel has forgotten descriptors that are closed; others
// are in fds. A closed loop's number may be another file's by now.
func (l *loop) forget(number int32, fds ...int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		for _, fd := range fds {
			_ = unix.EpollCtl(l.fd, unix.EPOLL_CTL_DEL, fd, nil)
		}
	}
	l.drop(number)
}

func (l *loop) watcher(e *unix.EpollEvent) watcher {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.slots[e.Fd>>1]; s.use == e.Pad {
		return s.watcher
	}
	return nil
}

// close ends the loop and returns the watchers that are left.
func (l *loop) close() []watcher {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	_ = l.epoll.Close()
	var left []watcher
	for _, s := range l.slots {
		if s.watcher != nil {
			left = append(left, s.watcher)
		}
	}
	return left
}

// run serves events until the loop is closed.
func (l *loop) run() {
	for {
		n, ok := l.wait()
		if !ok {
			return
		}
		for i := range l.events[:n] {
			e := &l.events[i]
			if w := l.watcher(e); w != nil {
				w.serve(int(e.Fd&1), e.Events)
			}
		}
		again := l.again
		l.again = l.spare[:0]
		for _, t := range again {
			t.relay.proceed(t.side)
		}
		clear(again)
		l.spare = again
	}
}

// wait waits for events, unless there is more to do anyway.
func (l *loop) wait() (n int, ok bool) {
	if l.bulk && !l.alone && time.Since(l.parked) < parkEvery {
		if n = l.linger(); n > 0 || len(l.again) > 0 {
			return n, true
		}
	}
	l.bulk = false
	defer func() { l.parked, l.alone = time.Now(), runtime.GOMAXPROCS(0) == 1 }()
	err := l.raw.Read(func(fd uintptr) bool {
		for {
			var err error
			n, err = unix.EpollWait(int(fd), l.events[:], 0)
			if err != nil {
				n = 0
			}
			if err != syscall.EINTR { //nolint:errorlint // errnos are never wrapped here
				return n > 0 || len(l.again) > 0
			}
		}
	})
	return n, err == nil
}

// linger waits for events, and not long. It reports none where the kernel is older
// than the call (5.11).
func (l *loop) linger() (n int) {
	limit := unix.NsecToTimespec(int64(lingering))
	if len(l.again) > 0 {
		limit = unix.Timespec{}
	}
	err := l.raw.Control(func(fd uintptr) { // which keeps it open
		var errno syscall.Errno
		if n, errno = rawEpollWait(int(fd), l.events[:], &limit); errno != 0 {
			n = 0 // it was a signal, as a rule
		}
	})
	if err != nil {
		return 0
	}
	return n
}
