package capture

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// eventsAtOnce is how many sockets a loop learns of at once, and served many of
	// them are so many that it has others help.
	eventsAtOnce = 64
	servedMany   = 8
)

// A loop reads the packet endpoints of a [Bind], all of them by one goroutine. A server
// has something to say to many peers now and then, each time to a few of them at once.
// With a goroutine for each, the runtime would wake a thread for the second packet and
// one for the third, each of which comes to code and data that its processor does not
// have at hand; that cost more than all the rest of what a packet takes.
//
// The loop waits by an epoll(7) instance of its own, which is a descriptor that the
// runtime's poller watches, so that no thread is kept. When many endpoints have something at once,
// helpers take a share, one for each processor more than one.
type loop struct {
	serve func(*endpoint, *batch) (int, error)
	epoll *os.File
	raw   syscall.RawConn
	fd    int

	mu     sync.Mutex
	known  []*endpoint // by descriptor
	closed bool

	// Of the goroutine of run, but for helpers during share.
	events [eventsAtOnce]unix.EpollEvent
	todo   []*endpoint // in this round
	moreMu sync.Mutex  // guards again
	again  []*endpoint // in the next one, although there are no events
	room   batch

	next    atomic.Int32  // of todo
	helpers chan struct{} // one is to help
	helping sync.WaitGroup
}

// newLoop makes a loop that has serve read what waits at an endpoint, one goroutine at
// a time.
func newLoop(serve func(*endpoint, *batch) (int, error)) (*loop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // else os.NewFile would not have it watched
	}
	if err != nil {
		return nil, fmt.Errorf("watch packet endpoints: %w", err)
	}
	l := &loop{serve: serve, epoll: os.NewFile(uintptr(fd), "epoll"), fd: fd, helpers: make(chan struct{})}
	if l.raw, err = l.epoll.SyscallConn(); err != nil {
		_ = l.epoll.Close()
		return nil, fmt.Errorf("watch packet endpoints: %w", err)
	}
	return l, nil
}

// add makes an endpoint known, and takes what memory that needs. Nothing is read yet.
func (l *loop) add(e *endpoint) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	fd := e.udp.fd
	event := unix.EpollEvent{Fd: int32(fd)} //nolint:gosec // a descriptor
	if err := unix.EpollCtl(l.fd, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	if missing := fd + 1 - len(l.known); missing > 0 {
		l.known = append(l.known, make([]*endpoint, missing)...)
	}
	l.known[fd] = e
	return nil
}

// start begins to read an endpoint, or begins again: what waits there is an event.
func (l *loop) start(e *endpoint) {
	e.udp.mu.RLock()
	defer e.udp.mu.RUnlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.udp.fd < 0 || l.closed {
		return
	}
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(e.udp.fd)} //nolint:gosec // a descriptor
	_ = unix.EpollCtl(l.fd, unix.EPOLL_CTL_MOD, e.udp.fd, &event)                      // it is there, and takes no memory
}

// remove forgets an endpoint, whose socket is to be closed now. It may be served once
// more. To let the kernel do so by itself would not do: while it looks for events it
// holds sockets, and one that is closed then has its address for a moment longer.
func (l *loop) remove(e *endpoint) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fd := e.udp.fd
	if fd < 0 {
		return
	}
	l.known[fd] = nil
	if !l.closed {
		_ = unix.EpollCtl(l.fd, unix.EPOLL_CTL_DEL, fd, nil) // it is there
	}
}

// close ends run. It waits for the round that is being served, which takes mu.
func (l *loop) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	_ = l.epoll.Close()
}

// run serves endpoints until the loop is closed.
func (l *loop) run() {
	l.room.init(false)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) - 1 {
		wg.Go(l.help)
	}
	_ = l.raw.Read(l.rounds) // it ends when the loop is closed
	close(l.helpers)
	wg.Wait()
}

// rounds serves what there is to serve, and returns when that is all. An event that
// comes meanwhile has it called again at once, as the runtime's poller remembers it. So
// the kernel is not asked for another one where they come one at a time.
func (l *loop) rounds(uintptr) bool {
	for l.poll() {
		if len(l.todo) >= servedMany {
			l.share()
			runtime.Gosched() // to those who read what peers send: there may be no end of this
			continue
		}
		single := true
		for _, e := range l.todo {
			single = l.one(e, &l.room) <= 1 && single
		}
		if single {
			break
		}
		if len(l.again) > 0 {
			runtime.Gosched() // likewise
		}
	}
	return false
}

// poll finds who is to be served.
func (l *loop) poll() bool {
	l.todo = append(l.todo[:0], l.again...)
	clear(l.again)
	l.again = l.again[:0]
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.fd), uintptr(unsafe.Pointer(&l.events[0])), eventsAtOnce, 0, 0, 0) //nolint:gosec // as rule 4 of package unsafe has it
	if errno != 0 {
		n = 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, had := range l.events[:n] {
		if e := l.known[had.Fd]; e != nil && (len(l.todo) == i || !slices.Contains(l.todo, e)) { // none is twice among events
			l.todo = append(l.todo, e)
		}
	}
	return len(l.todo) > 0
}

// one serves an endpoint and returns how many datagrams that was. It is served again
// if there may be more.
func (l *loop) one(e *endpoint, room *batch) int {
	n, err := l.serve(e, room)
	if n == batchSize {
		l.moreMu.Lock()
		l.again = append(l.again, e)
		l.moreMu.Unlock()
	}
	if err != nil && !errors.Is(err, net.ErrClosed) {
		// The error of a datagram sent earlier, as a rule: the socket lives.
		time.AfterFunc(shortestBackoff, func() { l.start(e) })
	}
	return n
}

// share has the helpers serve together with the loop, and returns when all is done.
func (l *loop) share() {
	l.next.Store(0)
	for range min(runtime.GOMAXPROCS(0)-1, len(l.todo)/servedMany) {
		l.helping.Add(1)
		select {
		case l.helpers <- struct{}{}:
		default: // not back yet from the last time, or there is none
			l.helping.Done()
		}
	}
	l.take(&l.room)
	l.helping.Wait()
}

// help helps when it is asked to.
func (l *loop) help() {
	var room batch
	for range l.helpers {
		if room.buffers[0] == nil {
			room.init(false)
		}
		l.take(&room)
		l.helping.Done()
	}
}

// take serves those that nobody else has taken, each by one goroutine.
func (l *loop) take(room *batch) {
	for {
		i := int(l.next.Add(1)) - 1
		if i >= len(l.todo) {
			return
		}
		l.one(l.todo[i], room)
	}
}
