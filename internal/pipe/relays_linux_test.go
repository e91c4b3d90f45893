package pipe

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"

	"culvert/internal/testtcp"
)

func newRelays(t *testing.T) *Relays {
	t.Helper()
	r, err := NewRelays(2, new(atomic.Int64))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func noSetup(int) error { return nil }

// A connection from Dial to the end, with more to send first than a socket takes at
// once and a reader that is late.
func TestDialAndJoin(t *testing.T) {
	r := newRelays(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	near, a := testtcp.Pair(t)
	_ = a.SetDeadline(time.Time{})
	options := 0
	b, err := r.Dial(t.Context(), ln.Addr().String(), func(fd int) error {
		options++
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4096)
	})
	if err != nil {
		t.Fatal(err)
	}
	if options != 1 || b.RemoteAddr().String() != ln.Addr().String() {
		t.Errorf("setup was called %d times, for %v", options, b.RemoteAddr())
	}
	first, rest := randomBytes(4<<20), []byte("and what is read")
	result := make(chan Result, 1)
	given := bytes.Clone(first)
	r.Join(a, b, Options{First: given}, func(res Result) { result <- res })
	clear(given) // it may be used for other things
	_, _ = near.Write(rest)
	_ = near.CloseWrite()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(50 * time.Millisecond) // the reader is late
	if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, append(first, rest...)) {
		t.Errorf("%d bytes came, %v", len(got), err)
	}
	_, _ = far.Write([]byte("answer"))
	_ = far.Close()
	if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
		t.Errorf("the answer is %q, %v", got, err)
	}
	if res := <-result; res.Reset || res.AtoB != int64(len(first)+len(rest)) || res.BtoA != 6 {
		t.Errorf("result %+v", res)
	}
}

// Before they are joined, what is accepted and what is dialled are connections as any.
func TestSocketsAreConns(t *testing.T) {
	r := newRelays(t)
	ln, err := Listen(t.Context(), "127.0.0.1:0", noSetup)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		if c1, err = r.Dial(t.Context(), ln.Addr().String(), noSetup); err != nil {
			return nil, nil, nil, err
		}
		if c2, err = ln.Accept(); err != nil {
			return nil, nil, nil, err
		}
		if c1.LocalAddr().String() != c2.RemoteAddr().String() || c2.LocalAddr().String() != c1.RemoteAddr().String() {
			t.Errorf("%v to %v, and %v to %v", c1.LocalAddr(), c1.RemoteAddr(), c2.RemoteAddr(), c2.LocalAddr())
		}
		return c1, c2, func() { c1.Close(); c2.Close() }, nil
	})
}

// What is dialled, accepted and joined ends as it should, whether it was read from
// and waited for before or not.
func TestSocketsAreJoined(t *testing.T) {
	r := newRelays(t)
	for _, waited := range []bool{false, true} {
		front, err := Listen(t.Context(), "127.0.0.1:0", noSetup)
		if err != nil {
			t.Fatal(err)
		}
		defer front.Close()
		back, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer back.Close()
		near, err := net.Dial("tcp4", front.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer near.Close()
		a, err := front.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if waited {
			time.AfterFunc(20*time.Millisecond, func() { _, _ = near.Write([]byte("first")) })
			if n, err := a.Read(make([]byte, 10)); n != 5 || err != nil {
				t.Fatalf("read %d, %v", n, err)
			}
		}
		b, err := r.Dial(t.Context(), back.Addr().String(), noSetup)
		if err != nil {
			t.Fatal(err)
		}
		far, err := back.Accept()
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan Result, 1)
		r.Join(a, b, Options{}, func(res Result) { done <- res })
		want := randomBytes(3 << 20)
		go func() {
			_, _ = near.Write(want)
			_ = near.(*net.TCPConn).CloseWrite()
		}()
		if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, want) {
			t.Errorf("waited %v: %d bytes came, %v", waited, len(got), err)
		}
		_ = far.Close()
		if _, err := near.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("waited %v: read at the end: %v", waited, err)
		}
		if res := <-done; res.Reset {
			t.Errorf("waited %v: %+v", waited, res)
		}
		for _, c := range []net.Conn{a, b} {
			if err := c.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("waited %v: it was not closed: %v", waited, err)
			}
		}
	}
}

func TestListenerEnds(t *testing.T) {
	ln, err := Listen(t.Context(), "127.0.0.1:0", noSetup)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { ln.Close() })
	if c, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept of a listener that was closed: %v, %v", c, err)
	}
}

func TestDialFails(t *testing.T) {
	r := newRelays(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	ln.Close()
	if c, err := r.Dial(t.Context(), closed, noSetup); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v, %v", c, err)
	}
	wrong := errors.New("wrong")
	if c, err := r.Dial(t.Context(), closed, func(int) error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("where setup fails: %v, %v", c, err)
	}
	// A listener whose queue is full answers no more.
	full := fullListener(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if c, err := r.Dial(ctx, full, noSetup); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("where nobody answers: %v, %v", c, err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if c, err := r.Dial(ctx, full, noSetup); !errors.Is(err, context.Canceled) {
		t.Errorf("where it was called off: %v, %v", c, err)
	}
	if c, err := r.Dial(ctx, full, noSetup); !errors.Is(err, context.Canceled) {
		t.Errorf("where it was called off before: %v, %v", c, err)
	}
}

// fullListener returns the address of one that accepts nobody, and has no room.
func fullListener(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port}
	for range 3 {
		if c, err := net.DialTimeout("tcp4", at.String(), 50*time.Millisecond); err == nil {
			t.Cleanup(func() { c.Close() })
		}
	}
	return at.String()
}

// What is joined can be aborted, by its function and by Close, and says so once.
func TestRelaysAbort(t *testing.T) {
	for _, how := range []string{"abort", "close"} {
		r, err := NewRelays(2, new(atomic.Int64))
		if err != nil {
			t.Fatal(err)
		}
		near, a := testtcp.Pair(t)
		b, far := testtcp.Pair(t)
		results := make(chan Result, 2)
		abort := r.Join(a, b, Options{}, func(res Result) { results <- res })
		if how == "abort" {
			abort()
		}
		r.Close()
		abort()
		if res := <-results; !res.Reset || !errors.Is(res.Err, net.ErrClosed) {
			t.Errorf("%s: result %+v", how, res)
		}
		if len(results) > 0 {
			t.Errorf("%s: it was told twice", how)
		}
		for _, c := range []net.Conn{near, far} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: read: %v, want a reset", how, err)
			}
		}
	}
}

// One connection that has much to move does not keep another of its loop waiting.
func TestRelaysTakeTurns(t *testing.T) {
	r := newRelays(t)
	for range 2 * len(r.loops) {
		near, a := testtcp.Pair(t)
		b, far := testtcp.Pair(t)
		_, _ = near.SetDeadline(time.Time{}), far.SetDeadline(time.Time{})
		abort := r.Join(a, b, Options{}, func(Result) {})
		t.Cleanup(abort)
		go func() { _, _ = io.Copy(io.Discard, far) }()
		go func() {
			for chunk := make([]byte, 1<<20); ; {
				if _, err := near.Write(chunk); err != nil {
					return
				}
			}
		}()
	}
	near, a := testtcp.Pair(t)
	b, far := testtcp.Pair(t)
	t.Cleanup(r.Join(a, b, Options{}, func(Result) {}))
	go func() { _, _ = io.Copy(far, far) }()
	for range 20 {
		_, _ = near.Write([]byte{1})
		if _, err := io.ReadFull(near, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
}

// A number that is used again does not get its predecessor's events.
func TestRelaysUseNumbersAgain(t *testing.T) {
	r := newRelays(t)
	for range 200 {
		near, a := testtcp.Pair(t)
		b, far := testtcp.Pair(t)
		done := make(chan Result, 1)
		r.Join(a, b, Options{}, func(res Result) { done <- res })
		_, _ = near.Write([]byte("x"))
		_ = near.Close()
		if got, err := io.ReadAll(far); err != nil || string(got) != "x" {
			t.Fatalf("read %q, %v", got, err)
		}
		_ = far.Close()
		if res := <-done; res.AtoB != 1 || res.Reset {
			t.Fatalf("result %+v", res)
		}
	}
	used := 0
	for _, l := range r.loops {
		l.mu.Lock()
		used += len(l.slots)
		l.mu.Unlock()
	}
	if used > 2*len(r.loops) {
		t.Errorf("%d numbers for connections that came one after the other", used)
	}
}

// What ends after its loop leaves the file alone that has the loop's number by then.
func TestForgetAfterClose(t *testing.T) {
	for range 10 {
		if forgetAfterClose(t) {
			return
		}
	}
	t.Fatal("each time something else had the number")
}

// forgetAfterClose reports false where something else has the number.
func forgetAfterClose(t *testing.T) bool {
	t.Helper()
	r, err := NewRelays(2, new(atomic.Int64))
	if err != nil {
		t.Fatal(err)
	}
	l := r.loops[0]
	w := &waiter{ready: make(chan struct{}, 1)}
	p := make([]int, 2)
	if err := unix.Pipe2(p, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	number, ok := l.watch(w, watched, p[0])
	if !ok {
		t.Fatal("a pipe is not watched")
	}
	r.Close()
	other, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if other != l.fd { // else it has the number anyway
		if _, err := unix.FcntlInt(uintptr(l.fd), unix.F_GETFD, 0); err == nil {
			for _, fd := range []int{other, p[0], p[1]} {
				_ = unix.Close(fd)
			}
			return false
		}
		if err := unix.Dup3(other, l.fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(l.fd)
	}
	watch := func() error {
		return unix.EpollCtl(other, unix.EPOLL_CTL_ADD, p[0], &unix.EpollEvent{Events: unix.EPOLLIN})
	}
	if err := watch(); err != nil {
		t.Fatal(err)
	}
	l.forget(number, p[0])
	if err := watch(); !errors.Is(err, unix.EEXIST) {
		t.Errorf("another's descriptor is watched no more: %v", err)
	}
	for _, fd := range []int{other, p[0], p[1]} {
		_ = unix.Close(fd)
	}
	return true
}

// While there is no room for what has come a loop is not told of more, and it is told
// again once there is.
func TestBlockedIsNotTold(t *testing.T) {
	near, a := testtcp.Pair(t)
	b, far := testtcp.Pair(t)
	if err := errors.Join(b.SetWriteBuffer(32<<10), far.SetReadBuffer(64<<10)); err != nil {
		t.Fatal(err)
	}
	l, err := newLoop() // which does not run: the test takes its turns
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	spliced := new(atomic.Int64)
	result := make(chan Result, 1)
	j := newRelay(&Relays{loops: []*loop{l}, spliced: spliced}, l, a, b, Options{}, func(res Result) { result <- res })
	if !j.begin(nil) {
		t.Fatal("not watched")
	}
	told := 0 // of bytes from near
	turn := func() (events int) {
		n, err := unix.EpollWait(l.fd, l.events[:], 20)
		if err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
		for i := range l.events[:max(n, 0)] {
			e := &l.events[i]
			if e.Fd&1 == 0 && e.Events&unix.EPOLLIN != 0 {
				told++
			}
			if w := l.watcher(e); w != nil {
				w.serve(int(e.Fd&1), e.Events)
			}
		}
		again := l.again
		l.again = nil
		for _, next := range again {
			next.relay.proceed(next.side)
		}
		return max(n, 0) + len(again)
	}
	sent := randomBytes(300 << 10)
	const first = 200 << 10
	_, _ = near.Write(sent[:first])
	for turn() > 0 {
		continue
	}
	if !j.ways[0].waits() {
		t.Fatal("all of it was taken: nothing is shown")
	}
	told = 0
	_, _ = near.Write(sent[first:])
	turn()
	if told > 0 && j.ways[0].waits() {
		t.Error("told of bytes that cannot be handed on")
	}
	for _, part := range [][]byte{sent, []byte("and more")} {
		if len(part) < first {
			_, _ = near.Write(part)
		}
		read := make(chan []byte, 1)
		go func() {
			got := make([]byte, len(part))
			_, _ = io.ReadFull(far, got)
			read <- got
		}()
		for len(read) == 0 {
			turn()
		}
		if got := <-read; !bytes.Equal(got, part) {
			t.Errorf("%d bytes came, not as they were sent", len(got))
		}
	}
	if spliced.Load() == 0 {
		t.Error("none was spliced")
	}
	_, _ = near.CloseWrite(), far.CloseWrite()
	for len(result) == 0 {
		turn()
	}
	if res := <-result; res.Reset || res.AtoB != int64(len(sent)+len("and more")) {
		t.Errorf("result %+v", res)
	}
}
