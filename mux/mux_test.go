package mux

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"culvert/sniff"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The listener and its limits are real TCP; the time limits are set short
// enough to be waited for.

// echo answers each connection with the name it was given and what came.
func echo(name string) Handler {
	return HandlerFunc(func(_ context.Context, c *sniff.Conn, _ Establish) {
		defer func() { _ = c.Close() }()
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err == nil {
			_, _ = io.WriteString(c, name+" "+string(b))
		}
	})
}

type running struct {
	*Server
	addr string
	m    *Metrics
	stop context.CancelFunc
	done chan error
}

func start(t *testing.T, o Options) *running {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	s, err := New(ln, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{s, ln.Addr().String(), o.Metrics, cancel, make(chan error, 1)}
	go func() { r.done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := r.wait(t); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.done:
		r.done <- err
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("Run did not return within 10 s")
		return nil
	}
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		t.Fatalf("dialled a %T", c)
	}
	return tcp
}

// await waits until ok, for up to 5 s.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 5000 {
		if ok() {
			return
		}
		<-tick.C
	}
	t.Errorf("waited in vain for %s", what)
}

// awaitRefused waits until one connection was refused for a reason.
func awaitRefused(t *testing.T, m *Metrics, reason string) {
	t.Helper()
	await(t, "one count of "+reason, func() bool { return testutil.ToFloat64(m.refused.WithLabelValues(reason)) == 1 })
}

func TestFirstByteDecides(t *testing.T) {
	r := start(t, Options{TLS: echo("tls"), Plain: echo("plain")})
	for send, want := range map[string]string{"\x16abc": "tls \x16", "GET /": "plain G"} {
		c := dial(t, r.addr)
		_, _ = io.WriteString(c, send)
		_ = c.CloseWrite()
		got, _ := io.ReadAll(c)
		if string(got) != want {
			t.Errorf("%q was answered %q, want %q", send, got, want)
		}
	}
	if tls, plain := testutil.ToFloat64(r.m.tls), testutil.ToFloat64(r.m.plain); tls != 1 || plain != 1 {
		t.Errorf("accepted %v tls and %v plain, want 1 and 1", tls, plain)
	}
}

func TestRefusals(t *testing.T) {
	r := start(t, Options{TLS: echo("tls")})
	c := dial(t, r.addr)
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	if got, _ := io.ReadAll(c); len(got) > 0 {
		t.Errorf("plain HTTP was answered %q", got)
	}
	awaitRefused(t, r.m, reasonNotTLS)

	_ = dial(t, r.addr).Close() // a port scanner
	awaitRefused(t, r.m, reasonClosedEarly)

	hasty := start(t, Options{TLS: echo("tls"), FirstByteTimeout: 100 * time.Millisecond})
	if got, err := io.ReadAll(dial(t, hasty.addr)); err != nil || len(got) > 0 {
		t.Errorf("silence was answered %q, %v", got, err)
	}
	awaitRefused(t, hasty.m, reasonFirstByteTimeout)
	awaitRefused(t, r.m, reasonNotTLS)
	awaitRefused(t, r.m, reasonClosedEarly)
}

// held is a handler whose connections stay until they are released or cut.
type held struct {
	release chan struct{}
	entered chan struct{}
}

func newHeld() *held {
	return &held{release: make(chan struct{}), entered: make(chan struct{}, 100)}
}

func (h *held) ServeConn(ctx context.Context, c *sniff.Conn, establish func(bool) bool) {
	establish(false)
	h.entered <- struct{}{}
	select {
	case <-h.release:
	case <-ctx.Done():
	}
	_ = c.Close()
}

func open(t *testing.T, r *running, h *held) *net.TCPConn {
	t.Helper()
	c := dial(t, r.addr)
	_, _ = c.Write([]byte{tlsHandshake})
	select {
	case <-h.entered:
	case <-time.After(5 * time.Second):
		t.Fatal("no handler was entered within 5 s")
	}
	return c
}

func TestLimitPerSource(t *testing.T) {
	h := newHeld()
	r := start(t, Options{TLS: h, MaxConnsPerSource: 2, DrainTimeout: time.Millisecond})
	open(t, r, h)
	open(t, r, h)
	c := dial(t, r.addr)
	_, _ = c.Write([]byte{tlsHandshake})
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a third connection of one source was served")
	}
	awaitRefused(t, r.m, reasonLimitSource)
	close(h.release)
	// Places are given back, though not before the handlers have returned.
	for range 5 {
		await(t, "the places to be free", func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return len(r.sources) == 0
		})
		open(t, r, h)
	}
	awaitRefused(t, r.m, reasonLimitSource)
}

// When all places are taken the next connection waits in the kernel, and is
// served when one ends.
func TestLimitInAll(t *testing.T) {
	h := newHeld()
	r := start(t, Options{TLS: h, MaxConns: 1, DrainTimeout: time.Millisecond})
	open(t, r, h)
	c := dial(t, r.addr)
	_, _ = c.Write([]byte{tlsHandshake})
	select {
	case <-h.entered:
		t.Fatal("a second connection was served")
	case <-time.After(50 * time.Millisecond):
	}
	close(h.release)
	select {
	case <-h.entered:
	case <-time.After(5 * time.Second):
		t.Fatal("the second connection was not served after the first had ended")
	}
}

func TestStuckHandlerDelaysNobody(t *testing.T) {
	h := newHeld()
	r := start(t, Options{TLS: h, Plain: echo("plain"), DrainTimeout: time.Millisecond})
	open(t, r, h)
	_ = dial(t, r.addr) // silent
	c := dial(t, r.addr)
	_, _ = io.WriteString(c, "x")
	if got, _ := io.ReadAll(c); string(got) != "plain x" {
		t.Errorf("answered %q", got)
	}
}

func TestPanicIsKeptToItsConnection(t *testing.T) {
	r := start(t, Options{TLS: HandlerFunc(func(context.Context, *sniff.Conn, Establish) { panic("bytes of a stranger") }), Plain: echo("plain")})
	c := dial(t, r.addr)
	_, _ = c.Write([]byte{tlsHandshake})
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection lives on")
	}
	c = dial(t, r.addr)
	_, _ = io.WriteString(c, "x")
	if got, _ := io.ReadAll(c); string(got) != "plain x" {
		t.Errorf("the next connection was answered %q", got)
	}
}

func TestDrain(t *testing.T) {
	t.Run("handlers that end are waited for", func(t *testing.T) {
		draining := make(chan struct{})
		h := HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
			establish(false)
			_, _ = io.WriteString(c, "!")
			<-draining
			if ctx.Err() != nil {
				t.Error("the context ended with the drain's beginning")
			}
			_, _ = io.WriteString(c, "bye")
			_ = c.Close()
		})
		r := start(t, Options{TLS: h})
		c := dial(t, r.addr)
		_, _ = c.Write([]byte{tlsHandshake})
		_, _ = io.ReadFull(c, make([]byte, 1))
		r.stop()
		close(draining)
		buf := make([]byte, 3)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "bye" {
			t.Errorf("read %q, %v", buf, err)
		}
		if err := r.wait(t); err != nil {
			t.Error(err)
		}
		if _, err := net.Dial("tcp4", r.addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial after the stop: %v, want refused", err)
		}
	})
	t.Run("the rest is cut off", func(t *testing.T) {
		h := newHeld()
		r := start(t, Options{TLS: h, DrainTimeout: 50 * time.Millisecond})
		c := open(t, r, h)
		r.stop()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
		if err := r.wait(t); err != nil {
			t.Error(err)
		}
	})
}

func TestNewAndRunAreChecked(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	for field, o := range map[string]Options{
		"TLS": {}, "MaxConns": {TLS: echo(""), MaxConns: -1}, "MaxConnsPerSource": {TLS: echo(""), MaxConnsPerSource: -1},
		"FirstByteTimeout": {TLS: echo(""), FirstByteTimeout: -1}, "DrainTimeout": {TLS: echo(""), DrainTimeout: -1},
		"LingerTimeout": {TLS: echo(""), LingerTimeout: -1}, "MaxPending": {TLS: echo(""), MaxPending: -1},
	} {
		if _, err := New(ln, o); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("bad %s: error %v does not name it", field, err)
		}
	}
	s, err := New(ln, Options{TLS: echo("")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Errorf("Run with a context that has ended: %v", err)
	}
	if err := s.Run(ctx); err == nil {
		t.Error("a second Run succeeded")
	}
}

func TestSourceOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:80": "192.0.2.7/32", "[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64", "[::ffff:192.0.2.7]:80": "192.0.2.7/32",
	} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := sourceOf(a).String(); got != want {
			t.Errorf("sourceOf(%s) = %s, want %s", addr, got, want)
		}
	}
}
