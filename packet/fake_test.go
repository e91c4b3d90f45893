package packet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"culvert/catalog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// half is one direction of a connection.
type half struct {
	mu      sync.Mutex
	buf     []byte
	eof     bool
	err     error
	blocked bool
	changed chan struct{}
}

func newHalf() *half { return &half{changed: make(chan struct{})} }

func (h *half) update(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	close(h.changed)
	h.changed = make(chan struct{})
}

// deadline is one of a conn's two.
type deadline struct {
	mu      sync.Mutex
	at      time.Time
	changed chan struct{}
}

func newDeadline() *deadline { return &deadline{changed: make(chan struct{})} }

func (d *deadline) set(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = at
	close(d.changed)
	d.changed = make(chan struct{})
}

// wait blocks until changed is closed, the deadline passes or it is set anew.
func (d *deadline) wait(changed <-chan struct{}) error {
	d.mu.Lock()
	at, reset := d.at, d.changed
	d.mu.Unlock()
	var passed <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(time.Until(at))
		defer t.Stop()
		passed = t.C
	}
	select {
	case <-changed:
	case <-reset:
	case <-passed:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// testConn is one end of a connection in memory. Its writes are pending while it is blocked, and recorded.
type testConn struct {
	net.Conn // for the methods that nobody calls
	in, out  *half
	read     *deadline
	write    *deadline
	coalesce bool

	mu     sync.Mutex
	writes [][]byte
	kept   []byte // written while it was blocked
	lost   bool   // what is written gets nowhere
}

func testPair(coalesce bool) (a, b *testConn) {
	x, y := newHalf(), newHalf()
	end := func(in, out *half) *testConn {
		return &testConn{in: in, out: out, read: newDeadline(), write: newDeadline(), coalesce: coalesce}
	}
	return end(x, y), end(y, x)
}

func (c *testConn) Coalesce() bool       { return c.coalesce }
func (c *testConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8443} }

func (c *testConn) Read(p []byte) (int, error) {
	h := c.in
	for {
		h.mu.Lock()
		n, changed, err := copy(p, h.buf), h.changed, h.err
		h.buf = h.buf[n:]
		if err == nil && n == 0 && h.eof {
			err = io.EOF
		}
		h.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if err == nil {
			err = c.read.wait(changed)
		}
		if err != nil {
			return 0, err
		}
	}
}

func (c *testConn) Write(p []byte) (int, error) {
	h := c.out
	h.mu.Lock()
	err, blocked := h.err, h.blocked
	if err == nil && h.eof {
		err = syscall.EPIPE
	}
	h.mu.Unlock()
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	c.writes = append(c.writes, bytes.Clone(p))
	if c.lost {
		c.mu.Unlock()
		return len(p), nil
	}
	if blocked || len(c.kept) > 0 {
		c.kept = append(c.kept, p...)
		p = nil
	}
	c.mu.Unlock()
	n := len(p)
	h.update(func() { h.buf = append(h.buf, p...) })
	return n, nil
}

func (c *testConn) Pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.kept) > 0
}

func (c *testConn) Flush() error {
	h := c.out
	for {
		h.mu.Lock()
		err, changed, blocked := h.err, h.changed, h.blocked
		h.mu.Unlock()
		if err != nil {
			return err
		}
		if !blocked {
			break
		}
		if err := c.write.wait(changed); err != nil {
			return err
		}
	}
	c.mu.Lock()
	kept := c.kept
	c.kept = nil
	c.mu.Unlock()
	h.update(func() { h.buf = append(h.buf, kept...) })
	return nil
}

// block keeps what is written to c until unblock.
func (c *testConn) block() { c.out.update(func() { c.out.blocked = true }) }

func (c *testConn) swallow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost = true
}
func (c *testConn) unblock() { c.out.update(func() { c.out.blocked = false }) }

func (c *testConn) recorded() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writes
}

func (c *testConn) CloseWrite() error {
	c.out.update(func() { c.out.eof = true })
	return nil
}

func (c *testConn) Close() error {
	c.out.update(func() { c.out.eof = true })
	c.in.update(func() { c.in.err = errors.Join(c.in.err, net.ErrClosed) })
	return nil
}

func (c *testConn) Abort() {
	c.out.update(func() { c.out.buf, c.out.err = nil, syscall.ECONNRESET })
	c.in.update(func() { c.in.buf, c.in.err = nil, syscall.ECONNRESET })
}

func (c *testConn) SetReadDeadline(t time.Time) error  { c.read.set(t); return nil }
func (c *testConn) SetWriteDeadline(t time.Time) error { c.write.set(t); return nil }

func bob() catalog.Key { return catalog.Key{Datacenter: "dc2", Node: "bob"} }

// bed runs one link against acceptors in memory.
type bed struct {
	*Link
	dials   atomic.Int32
	times   []time.Time    // of the dials
	fail    atomic.Bool    // dials end in an error
	hang    atomic.Bool    // dials wait for the end of their context
	peers   chan *testConn // the acceptor's ends
	dialled chan *testConn // the link's ends
	logs    *observer.ObservedLogs
	stop    func()
}

var errDial = errors.New("no path")

func newBed(t *testing.T, coalesce bool, o LinkOptions) *bed {
	core, logs := observer.New(zap.DebugLevel)
	b := &bed{peers: make(chan *testConn, 100), dialled: make(chan *testConn, 100), logs: logs}
	o.Peer, o.Service, o.Log = bob(), "gossip-packet", zap.New(core)
	b.Link = NewLink(func(ctx context.Context) (Conn, error) {
		b.dials.Add(1)
		b.times = append(b.times, time.Now())
		if b.hang.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if b.fail.Load() {
			return nil, errDial
		}
		near, far := testPair(coalesce)
		b.peers <- far
		b.dialled <- near
		return near, nil
	}, o)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = b.o.Pulse.Run(ctx) })
	b.Start(ctx)
	b.stop = sync.OnceFunc(func() {
		b.Stop()
		cancel()
		wg.Wait()
	})
	t.Cleanup(b.stop)
	return b
}

// peer returns the acceptor's end of the next connection, with the answer given.
func (b *bed) peer(t *testing.T) *testConn {
	t.Helper()
	synctest.Wait()
	select {
	case c := <-b.peers:
		if c.coalesce {
			if _, err := c.Write(AppendFrame(nil, nil)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		return c
	default:
		t.Fatal("the link has not dialled")
		return nil
	}
}

func (b *bed) wantState(t *testing.T, want string) {
	t.Helper()
	synctest.Wait()
	if st := b.Status(); st.State != want {
		t.Fatalf("state %q, want %q (last error %q)", st.State, want, st.LastError)
	}
}

func (b *bed) wantDrops(t *testing.T, want map[string]uint64) {
	t.Helper()
	got := b.Status().Drops
	if len(got) != len(want) {
		t.Fatalf("drops %v, want %v", got, want)
	}
	for r, n := range want {
		if got[r] != n {
			t.Fatalf("drops %v, want %v", got, want)
		}
	}
}

// frames takes what has arrived at c and returns its payloads.
func frames(t *testing.T, c *testConn) []string {
	t.Helper()
	synctest.Wait()
	c.in.mu.Lock()
	b := c.in.buf
	c.in.buf = nil
	c.in.mu.Unlock()
	d := model(b)
	if !errors.Is(d.err, io.EOF) {
		t.Fatalf("what arrived is not whole frames: %v", d.err)
	}
	var got []string
	for _, p := range d.payloads {
		got = append(got, string(p))
	}
	return got
}

// ended returns how c's peer ended the connection, nil if it has not.
func ended(c *testConn) error {
	synctest.Wait()
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	if c.in.err == nil && c.in.eof {
		return io.EOF
	}
	return c.in.err
}

func wantFrames(t *testing.T, c *testConn, want ...string) {
	t.Helper()
	got := frames(t, c)
	if len(got) != len(want) {
		t.Fatalf("got %d frames %.60q, want %d %.60q", len(got), got, len(want), want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("frame %d is %.60q, want %.60q", i, got[i], want[i])
		}
	}
}
