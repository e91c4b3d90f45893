package session

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"

	"culvert/internal/pipe"
	"culvert/internal/testtcp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcp is a plain connection in the place of one with TLS.
type tcp struct{ net.Conn }

func (c tcp) Abort() { pipe.Abort(c.Conn) }

// pair returns the two ends of a session; handle takes what the far end accepts.
func pair(t *testing.T, o Options, handle func(*Stream)) (near, far *Session) {
	t.Helper()
	a, b := testtcp.Pair(t)
	near, err := Dial(tcp{a}, o)
	if err != nil {
		t.Fatal(err)
	}
	far, err = Accept(tcp{b}, o)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- far.Serve(handle) }()
	t.Cleanup(func() {
		near.Abort()
		near.Wait()
		within(t, "the end of Serve", func() { <-served })
	})
	return near, far
}

func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(15 * time.Second):
		t.Fatalf("%s: not within 15 s", what)
	}
}

// until waits for what real connections do, of which nobody is told.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	within(t, what, func() {
		for !done() {
			<-tick.C
		}
	})
}

func open(t *testing.T, s *Session, service string) *Stream {
	t.Helper()
	st, err := s.Open(service)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// accepted hands the streams of the far end to a test.
func accepted() (handle func(*Stream), next chan *Stream) {
	next = make(chan *Stream)
	return func(st *Stream) { next <- st }, next
}

// A stream is a TCP connection: both directions end by themselves, in any order.
func TestHalfClose(t *testing.T) {
	handle, next := accepted()
	near, far := pair(t, Options{}, handle)
	a := open(t, near, "gossip-stream")
	if _, err := a.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b := <-next
	if b.Service() != "gossip-stream" {
		t.Errorf("service %q", b.Service())
	}
	if err := b.Answer(OK); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(b); err != nil || string(got) != "question" {
		t.Errorf("the far side read %q, %v", got, err)
	}
	if _, err := b.Write([]byte("an answer")); err != nil {
		t.Fatal(err)
	}
	if err := b.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(a); err != nil || string(got) != "an answer" {
		t.Errorf("the near side read %q, %v", got, err)
	}
	if a.Moved() != 17 {
		t.Errorf("%d bytes moved, want 17", a.Moved())
	}
	_, _ = a.Close(), b.Close()
	until(t, "both ends forget the stream", func() bool { return near.Streams()+far.Streams() == 0 })
}

// A reset is no clean end, and comes behind what was written before it.
func TestReset(t *testing.T) {
	t.Run("by the dialler", func(t *testing.T) {
		handle, next := accepted()
		near, _ := pair(t, Options{}, handle)
		a := open(t, near, "rpc")
		_, _ = a.Write(bytes.Repeat([]byte("x"), 100_000))
		a.Abort()
		b := <-next
		_ = b.Answer(OK)
		got, err := io.ReadAll(b)
		if len(got) != 100_000 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the far side read %d bytes and %v, want 100000 and a reset", len(got), err)
		}
		b.Abort()
	})
	t.Run("by the acceptor", func(t *testing.T) {
		handle, next := accepted()
		near, _ := pair(t, Options{}, handle)
		a := open(t, near, "rpc")
		b := <-next
		_ = b.Answer(OK)
		_, _ = b.Write([]byte("half"))
		b.Abort()
		got, err := io.ReadAll(a)
		if string(got) != "half" || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the near side read %q and %v, want a reset", got, err)
		}
		if _, err := a.Write([]byte("more")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write behind a reset: %v", err)
		}
		a.Abort()
	})
	t.Run("behind a half-close", func(t *testing.T) {
		handle, next := accepted()
		near, _ := pair(t, Options{}, handle)
		a := open(t, near, "rpc")
		_ = a.CloseWrite()
		b := <-next
		_ = b.Answer(OK)
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Fatalf("the far side read: %v", err)
		}
		// The window is full, and the writer waits, when the reset comes.
		wrote := make(chan error, 1)
		go func() {
			_, err := b.Write(make([]byte, 3*DefaultWindow))
			wrote <- err
		}()
		if _, err := io.ReadFull(a, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		a.Abort()
		within(t, "the reset", func() {
			if !b.AwaitReset() {
				t.Error("AwaitReset: false")
			}
			if err := <-wrote; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the writer saw %v", err)
			}
		})
		b.Abort()
	})
}

// AwaitReset waits no longer than the relay that it is part of.
func TestAwaitResetEndsWithTheDeadline(t *testing.T) {
	handle, next := accepted()
	near, _ := pair(t, Options{}, handle)
	a := open(t, near, "rpc")
	b := <-next
	waiting := make(chan bool, 1)
	go func() { waiting <- b.AwaitReset() }()
	_ = b.SetReadDeadline(time.Now().Add(time.Hour))
	_ = b.SetReadDeadline(time.Unix(1, 0))
	within(t, "AwaitReset", func() {
		if <-waiting {
			t.Error("a reset that was none")
		}
	})
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read behind the deadline: %v", err)
	}
	a.Abort()
	b.Abort()
}

// The end of the connection is the end of no stream: it must not look complete.
func TestTheSessionsEndIsAReset(t *testing.T) {
	handle, next := accepted()
	near, far := pair(t, Options{}, handle)
	a := open(t, near, "rpc")
	b := <-next
	_ = b.Answer(OK)
	_, _ = b.Write([]byte("half"))
	if _, err := io.ReadFull(a, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	_ = far.Close()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the near side read: %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the side that closed read: %v", err)
	}
	if !a.AwaitReset() {
		t.Error("AwaitReset: false")
	}
	if _, err := near.Open("rpc"); err == nil {
		t.Error("a stream on a session that has ended")
	}
	a.Abort()
	b.Abort()
}

// Refusals are told with their reasons, and what was written meanwhile is lost
// with the stream alone.
func TestRefusals(t *testing.T) {
	handle := func(st *Stream) {
		_ = st.Answer(map[string]Status{"unknown": UnknownService, "forbidden": NotAllowed, "down": ServerDown}[st.Service()])
		st.Abort()
	}
	near, _ := pair(t, Options{}, handle)
	for service, want := range map[string]Status{"unknown": UnknownService, "forbidden": NotAllowed, "down": ServerDown} {
		st := open(t, near, service)
		_, _ = st.Write([]byte("question"))
		_, err := st.Read(make([]byte, 1))
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Status != want || !refused.Refused() {
			t.Errorf("%s: %v", service, err)
		}
		st.Abort()
	}
	until(t, "the refused streams are forgotten", func() bool { return near.Streams() == 0 })
}

// A far side that does not answer does not hold a stream for ever, and its
// session is known for it.
func TestNoAnswer(t *testing.T) {
	handle, next := accepted()
	near, _ := pair(t, Options{AnswerTimeout: 50 * time.Millisecond}, handle)
	a := open(t, near, "rpc")
	b := <-next
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, errNoAnswer) {
		t.Errorf("read: %v", err)
	}
	if !near.Late() {
		t.Error("the session is not known to be late")
	}
	a.Abort()
	b.Abort()
}

// Many streams at once get what is theirs; run it with the race detector.
func TestManyStreams(t *testing.T) {
	const streams, size = 64, 300_000
	near, _ := pair(t, Options{}, func(st *Stream) {
		_ = st.Answer(OK)
		_, err := io.Copy(st, st)
		if err != nil {
			t.Errorf("echo: %v", err)
		}
		_ = st.CloseWrite()
	})
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() {
			st := open(t, near, "echo")
			want := bytes.Repeat([]byte{byte(i)}, size)
			go func() {
				_, _ = st.Write(want)
				_ = st.CloseWrite()
			}()
			if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, want) {
				t.Errorf("stream %d: %d bytes, %v", i, len(got), err)
			}
			_ = st.Close()
		})
	}
	within(t, "all streams", wg.Wait)
}

// More than a session is to carry is refused, by either side.
func TestFull(t *testing.T) {
	handle, next := accepted()
	near, far := pair(t, Options{MaxStreams: 1}, handle)
	a := open(t, near, "rpc")
	b := <-next
	if _, err := near.Open("rpc"); !errors.Is(err, ErrFull) {
		t.Errorf("one more: %v", err)
	}
	near.o.MaxStreams = 2 // a dialler that knows no bound
	c := open(t, near, "rpc")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the one too many: %v", err)
	}
	if err := far.GoAway(); err != nil {
		t.Fatal(err)
	}
	within(t, "the farewell", func() {
		for {
			if _, err := near.Open("rpc"); errors.Is(err, ErrFull) {
				return
			}
			near.mu.Lock()
			clear(near.streams)
			near.mu.Unlock()
		}
	})
	a.Abort()
	b.Abort()
	c.Abort()
}

// A session whose acceptor has no stream of words works; a reset ends it whole, as
// nothing else would be seen as one.
func TestAcceptorWithoutWords(t *testing.T) {
	a, b := testtcp.Pair(t)
	plain, err := yamux.Server(b, Options{}.withDefaults().config())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	go func() {
		for {
			y, err := plain.AcceptStream()
			if err != nil {
				return
			}
			go func() {
				name, _ := readName(y)
				if name == "" {
					_, _ = y.Write([]byte{byte(UnknownService)})
					_ = y.Close()
					return
				}
				_, _ = y.Write(append([]byte{byte(OK)}, name...))
				_ = y.Close()
			}()
		}
	}()
	near, err := Dial(tcp{a}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	st := open(t, near, "echo")
	if got, err := io.ReadAll(st); err != nil || string(got) != "echo" {
		t.Errorf("read %q, %v", got, err)
	}
	_ = st.Close()
	<-near.mute
	st = open(t, near, "echo")
	st.Abort()
	within(t, "the end of the session", near.Wait)
}

// And a dialler that has none is served: its first stream is one like others.
func TestDiallerWithoutWords(t *testing.T) {
	a, b := testtcp.Pair(t)
	far, err := Accept(tcp{b}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		served <- far.Serve(func(st *Stream) {
			_ = st.Answer(OK)
			_, _ = io.Copy(st, st)
			_ = st.Close()
		})
	}()
	plain, err := yamux.Client(a, Options{}.withDefaults().config())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		y, err := plain.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = y.Write([]byte("\x04echohello"))
		_ = y.Close()
		if got, err := io.ReadAll(y); err != nil || string(got) != "\x00hello" {
			t.Errorf("read %q, %v", got, err)
		}
	}
	_ = plain.Close()
	within(t, "Serve", func() {
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// A word of a later version is no end.
func TestUnknownWords(t *testing.T) {
	handle, next := accepted()
	near, far := pair(t, Options{}, handle)
	a := open(t, near, "rpc")
	b := <-next
	_ = b.Answer(OK)
	if err := near.words.say(7, a.id); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("on")); err != nil {
		t.Fatal(err)
	}
	_ = a.CloseWrite()
	if got, err := io.ReadAll(b); err != nil || string(got) != "on" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := far.hear(7, 1001); err != nil || len(far.early) > 0 {
		t.Errorf("a word about no stream: %v, %d kept", err, len(far.early))
	}
	_ = b.CloseWrite()
	_, _ = a.Close(), b.Close()
}

// Words about streams that there are not take no memory without end.
func TestWordsAboutNothing(t *testing.T) {
	a, b := testtcp.Pair(t)
	far, err := Accept(tcp{b}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- far.Serve(func(st *Stream) { st.Abort() }) }()
	plain, err := yamux.Client(a, Options{}.withDefaults().config())
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	y, err := plain.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = y.Write([]byte{0})
	for id := range uint32(2 * maxEarly) {
		if _, err := y.Write(binary.BigEndian.AppendUint32([]byte{byte(wordReset)}, 1001+2*id)); err != nil {
			break
		}
	}
	within(t, "the session's end", func() { <-served })
}

// A frame is one write, and so one TLS record.
func TestFramesAreWhole(t *testing.T) {
	var writes counting
	handle, next := accepted()
	a, b := testtcp.Pair(t)
	writes.tcp = tcp{a}
	near, err := Dial(&writes, Options{})
	if err != nil {
		t.Fatal(err)
	}
	far, err := Accept(tcp{b}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = far.Serve(handle) }()
	st := open(t, near, "rpc")
	other := <-next
	before := writes.n.Load()
	_, _ = st.Write(make([]byte, maxWrite))
	if _, err := io.ReadFull(other, make([]byte, maxWrite)); err != nil {
		t.Fatal(err)
	}
	if n := writes.n.Load() - before; n != 1 {
		t.Errorf("%d writes for one frame", n)
	}
	near.Abort()
	near.Wait()
	other.Abort()
	<-served
}

type counting struct {
	tcp
	n atomic.Int64
}

func (c *counting) Write(p []byte) (int, error) { c.n.Add(1); return c.tcp.Write(p) }
