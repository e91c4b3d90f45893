package pipe

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"culvert/internal/testtcp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// These tests use real TCP connections: splice, half-close and reset are what
// only they have.

// wrapped hides that a connection is TCP, so that it is not spliced.
type wrapped struct{ net.Conn }

func (w wrapped) CloseWrite() error { return w.Conn.(*net.TCPConn).CloseWrite() }
func (w wrapped) Abort()            { Abort(w.Conn) }
func (w wrapped) TCP() *net.TCPConn { return w.Conn.(*net.TCPConn) }

// A rig is near <-> (a joined with b) <-> far.
type rig struct {
	near, a, b, far *net.TCPConn
	result          chan Result
}

type total struct{ n atomic.Int64 }

func (c *total) Add(n float64) { c.n.Add(int64(n)) }

// kinds are the pairs of connections that Join treats differently, and those that
// loops join.
var kinds = map[string]func(c *net.TCPConn, second bool) net.Conn{
	"relayed":  func(c *net.TCPConn, _ bool) net.Conn { return c },
	"spliced":  func(c *net.TCPConn, _ bool) net.Conn { return c },
	"buffered": func(c *net.TCPConn, _ bool) net.Conn { return wrapped{c} },
	"mixed": func(c *net.TCPConn, second bool) net.Conn {
		if second {
			return wrapped{c}
		}
		return c
	},
}

func newRig(t testing.TB, kind string, o Options) *rig {
	t.Helper()
	r := unjoined(t)
	r.join(t, kind, o)
	return r
}

func unjoined(t testing.TB) *rig {
	t.Helper()
	near, a := testtcp.Pair(t)
	b, far := testtcp.Pair(t)
	_ = a.SetDeadline(time.Time{})
	_ = b.SetDeadline(time.Time{})
	return &rig{near: near, a: a, b: b, far: far, result: make(chan Result, 1)}
}

func (r *rig) join(t testing.TB, kind string, o Options) {
	wrap := kinds[kind]
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.result <- join(t, kind, wrap(r.a, false), wrap(r.b, true), o)
	}()
	t.Cleanup(func() { Abort(r.near); Abort(r.far); <-done }) // it has given back its pipes
}

// join joins two connections by what a kind stands for.
func join(t testing.TB, kind string, a, b net.Conn, o Options) Result {
	if kind != "relayed" {
		return Join(a, b, o)
	}
	relays, err := NewRelays(2, new(atomic.Int64))
	if err != nil {
		t.Error(err)
		return Result{}
	}
	defer relays.Close()
	result := make(chan Result, 1)
	relays.Join(a, b, o, func(r Result) { result <- r })
	return <-result
}

func (r *rig) end(t testing.TB) Result {
	t.Helper()
	select {
	case res := <-r.result:
		return res
	case <-time.After(10 * time.Second):
		t.Fatal("Join did not return within 10 s")
		return Result{}
	}
}

func forEachKind(t *testing.T, f func(t *testing.T, kind string)) {
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) { f(t, kind) })
	}
}

func randomBytes(n int) []byte {
	r := rand.NewChaCha8([32]byte{1})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func TestBothWaysWhole(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		var out, in total
		r := newRig(t, kind, Options{AtoB: &out, BtoA: &in})
		there, back := randomBytes(5<<20+7), randomBytes(3<<20+1)
		var wg sync.WaitGroup
		send := func(c *net.TCPConn, b []byte) {
			wg.Go(func() {
				if _, err := c.Write(b); err != nil {
					t.Error(err)
				}
				_ = c.CloseWrite()
			})
		}
		check := func(c *net.TCPConn, want []byte) {
			wg.Go(func() {
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
					t.Errorf("read %d bytes, %v; want %d as they were sent", len(got), err, len(want))
				}
			})
		}
		send(r.near, there)
		send(r.far, back)
		check(r.far, there)
		check(r.near, back)
		wg.Wait()
		res := r.end(t)
		if res.AtoB != int64(len(there)) || res.BtoA != int64(len(back)) || res.Reset || res.Err != nil {
			t.Errorf("result %+v", res)
		}
		if out.n.Load() != res.AtoB || in.n.Load() != res.BtoA {
			t.Errorf("counters %d and %d, result %+v", out.n.Load(), in.n.Load(), res)
		}
	})
}

// A half-close travels on and leaves the other direction open, whichever side
// it comes from.
func TestHalfClose(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		for _, nearFirst := range []bool{true, false} {
			r := newRig(t, kind, Options{})
			first, second := r.near, r.far
			if !nearFirst {
				first, second = second, first
			}
			_, _ = io.WriteString(first, "question")
			_ = first.CloseWrite()
			if got, err := io.ReadAll(second); err != nil || string(got) != "question" {
				t.Fatalf("read %q, %v", got, err)
			}
			_, _ = io.WriteString(second, "answer")
			_ = second.CloseWrite()
			if got, err := io.ReadAll(first); err != nil || string(got) != "answer" {
				t.Fatalf("read %q, %v", got, err)
			}
			if res := r.end(t); res.Reset || res.Err != nil {
				t.Errorf("result %+v, want a clean end", res)
			}
		}
	})
}

func TestResetTravels(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		for _, nearFirst := range []bool{true, false} {
			r := newRig(t, kind, Options{})
			first, second := r.near, r.far
			if !nearFirst {
				first, second = second, first
			}
			_, _ = io.WriteString(first, "x")
			if _, err := io.ReadFull(second, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			Abort(first)
			if _, err := second.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read: %v, want a reset", err)
			}
			if res := r.end(t); !res.Reset || res.Err == nil {
				t.Errorf("result %+v, want a reset", res)
			}
		}
	})
}

// A side that has half-closed and then resets is noticed, though nothing is
// ever written to it.
func TestResetAfterHalfClose(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		for _, nearFirst := range []bool{true, false} {
			r := newRig(t, kind, Options{})
			first, second := r.near, r.far
			if !nearFirst {
				first, second = second, first
			}
			_ = first.CloseWrite()
			if _, err := second.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("read: %v, want EOF", err)
			}
			Abort(first)
			// The second learns by a reset, without having written anything.
			if res := r.end(t); !res.Reset {
				t.Errorf("result %+v, want a reset", res)
			}
		}
	})
}

// cut ends like a TLS connection that was cut off.
type cut struct{ net.Conn }

func (c cut) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestTruncationIsAReset(t *testing.T) {
	near, a := testtcp.Pair(t)
	b, _ := testtcp.Pair(t)
	res := Join(a, cut{b}, Options{})
	if !res.Reset || !errors.Is(res.Err, io.ErrUnexpectedEOF) {
		t.Errorf("result %+v, want a reset by io.ErrUnexpectedEOF", res)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
}

func TestSlowReceiverHoldsTheSenderBack(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		r := newRig(t, kind, Options{})
		_ = r.near.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		sent := 0
		var err error
		for chunk := make([]byte, 1<<20); err == nil && sent < 1<<30; {
			var n int
			n, err = r.near.Write(chunk)
			sent += n
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes went in to a receiver that reads none (%v)", sent, err)
		}
		_ = r.near.CloseWrite()
		if n, err := io.Copy(io.Discard, r.far); err != nil || n != int64(sent) {
			t.Errorf("%d bytes came out, %v; %d went in", n, err, sent)
		}
	})
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// An idle connection holds its two sockets and no pipe.
func TestIdleHoldsNoPipe(t *testing.T) {
	const n = 8
	before := countFDs(t)
	var rigs []*rig
	for range n {
		r := newRig(t, "spliced", Options{})
		_, _ = io.WriteString(r.near, "x")
		_, _ = io.ReadFull(r.far, make([]byte, 1))
		rigs = append(rigs, r)
	}
	// Four sockets a rig; all joins together may keep a few pipes for later.
	if got := countFDs(t) - before; got > 4*n+2*2 {
		t.Errorf("%d descriptors for %d joins, want at most %d", got, n, 4*n+4)
	}
	for _, r := range rigs {
		_ = r.near.Close()
		_ = r.far.Close()
		r.end(t)
	}
}

// Where no pipe can be had bytes are copied, and none is lost.
func TestOutOfDescriptors(t *testing.T) {
	pipes.mu.Lock()
	for _, p := range pipes.free {
		p.close()
	}
	pipes.free = nil
	pipes.mu.Unlock()

	r := unjoined(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	low := old
	low.Cur = 3 // nothing new can be opened; what is open stays
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &old) }()
	r.join(t, "spliced", Options{})
	want := randomBytes(1 << 20)
	go func() {
		_, _ = r.near.Write(want)
		_ = r.near.CloseWrite()
	}()
	if got, err := io.ReadAll(r.far); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v; want %d as they were sent", len(got), err, len(want))
	}
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	if n := len(pipes.free); n != 0 {
		t.Errorf("%d pipes were made: the limit was not in force", n)
	}
}

// A connection that breaks while its pipe holds bytes does not leave them to
// the next one.
func TestPipesAreGivenBackEmpty(t *testing.T) {
	for i := range 40 {
		r := newRig(t, []string{"spliced", "relayed"}[i%2], Options{})
		_ = r.near.SetWriteDeadline(time.Now().Add(30 * time.Millisecond))
		for _, err := r.near.Write(make([]byte, 8<<20)); err == nil; {
			_, err = r.near.Write(make([]byte, 8<<20))
		}
		Abort(r.far)
		r.end(t)
	}
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	for _, p := range pipes.free {
		if n, err := unix.IoctlGetInt(p.r, unix.TIOCINQ); err != nil || n != 0 {
			t.Errorf("an idle pipe holds %d bytes (%v)", n, err)
		}
	}
}

func BenchmarkJoin(b *testing.B) {
	for kind := range kinds {
		b.Run(kind, func(b *testing.B) {
			r := newRig(b, kind, Options{})
			for _, c := range []*net.TCPConn{r.near, r.far} {
				_ = c.SetDeadline(time.Time{})
			}
			chunk := make([]byte, 256<<10)
			b.SetBytes(int64(len(chunk)))
			go func() {
				for range b.N {
					_, _ = r.near.Write(chunk)
				}
				_ = r.near.CloseWrite()
			}()
			if _, err := io.Copy(io.Discard, r.far); err != nil {
				b.Fatal(err)
			}
			_ = r.far.Close()
			r.end(b)
		})
	}
}

// records is a source that reads by parts of a record at the most, as TLS does.
type records struct {
	net.Conn
	t     *testing.T
	left  int
	waits int // how often it was waited for without a buffer
}

func (r *records) AwaitRead() { r.waits++ }

func (r *records) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	return r.ReadMore(p)
}

func (r *records) ReadMore(p []byte) (int, error) {
	n := min(len(p), partSize, r.left)
	if n == len(p) {
		r.t.Errorf("with %d bytes to come a buffer is full: whether there are more cannot be told", r.left)
	}
	r.left -= n
	return n, nil
}

// What is read by records goes on by as few writes as there are buffers of them, and a
// buffer is given back before more is waited for.
func TestRecordsAreCopiedTogether(t *testing.T) {
	src := &records{t: t, left: 10 * partSize}
	var to writes
	n, read, write := copyBuffer(&to, src, counter{})
	if n != 10*partSize || read != nil || write != nil {
		t.Fatalf("%d bytes, %v, %v", n, read, write)
	}
	if want := []int{4 * partSize, 4 * partSize, 2 * partSize}; !slices.Equal(to, want) || src.waits != len(want)+1 {
		t.Errorf("written are %v, want %v, and it has waited %d times", to, want, src.waits)
	}
}

// writes are the lengths of what was written.
type writes []int

func (w *writes) Write(p []byte) (int, error) {
	*w = append(*w, len(p))
	return len(p), nil
}
