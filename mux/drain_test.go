package mux

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"culvert/internal/memnet"
	"culvert/sniff"
)

// What has a timer runs here in memory, inside a synctest bubble.

// bubble is a server in a bubble.
type bubble struct {
	*Server
	m    *Metrics
	log  *observer.ObservedLogs
	stop context.CancelFunc
	done chan error
}

func runBubble(t *testing.T, ln net.Listener, o Options) *bubble {
	t.Helper()
	core, log := observer.New(zapcore.DebugLevel)
	o.Log, o.Metrics = zap.New(core), NewMetrics(nil)
	s, err := New(ln, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &bubble{s, o.Metrics, log, cancel, make(chan error, 1)}
	go func() { b.done <- s.Run(ctx) }()
	return b
}

// stopped stops the server, and returns after how long Run did and with what.
func (b *bubble) stopped() (time.Duration, error) {
	synctest.Wait()
	began := time.Now()
	b.stop()
	err := <-b.done
	return time.Since(began), err
}

func (b *bubble) wantStop(t *testing.T, after time.Duration) {
	t.Helper()
	if took, err := b.stopped(); err != nil || took != after {
		t.Errorf("Run returned %v after %v, want nil after %v", err, took, after)
	}
	if open := testutil.ToFloat64(b.m.open); open != 0 {
		t.Errorf("%v connections are counted as open after the stop", open)
	}
}

// refused is the count of each reason that is not 0.
func (b *bubble) refused() map[string]float64 {
	counts := make(map[string]float64)
	for _, r := range []string{reasonNotTLS, reasonClosedEarly, reasonFirstByteTimeout, reasonLimitSource, reasonLimitPending} {
		if n := testutil.ToFloat64(b.m.refused.WithLabelValues(r)); n != 0 {
			counts[r] = n
		}
	}
	return counts
}

func dialMem(t *testing.T, ln *memnet.Listener, send string) *memnet.Conn {
	t.Helper()
	c, err := ln.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, send); err != nil {
		t.Fatal(err)
	}
	m, ok := c.(*memnet.Conn)
	if !ok {
		t.Fatalf("dialled a %T", c)
	}
	return m
}

func TestFirstByteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{TLS: echo("tls")})
		began := time.Now()
		c := dialMem(t, ln, "")
		if _, err := c.Read(make([]byte, 1)); err != io.EOF || time.Since(began) != DefaultFirstByteTimeout {
			t.Errorf("silence: %v after %v, want an end after %v", err, time.Since(began), DefaultFirstByteTimeout)
		}
		dialMem(t, ln, "").Abort()
		synctest.Wait()
		if got := b.refused(); len(got) != 2 || got[reasonFirstByteTimeout] != 1 || got[reasonClosedEarly] != 1 {
			t.Errorf("refused: %v", got)
		}
		b.wantStop(t, 0)
	})
}

// The limit on the first byte says nothing about the second.
func TestFirstByteDeadlineIsCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{TLS: HandlerFunc(func(_ context.Context, c *sniff.Conn, _ Establish) {
			defer func() { _ = c.Close() }()
			if got, err := io.ReadAll(c); err != nil || string(got) != "\x16 late" {
				t.Errorf("read %q, %v", got, err)
			}
		})})
		c := dialMem(t, ln, "\x16")
		<-time.After(time.Hour)
		_, _ = io.WriteString(c, " late")
		_ = c.Close()
		b.wantStop(t, 0)
	})
}

// A hello that drips holds up nobody else, and not for longer than its handler
// lets it.
func TestSlowHelloDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		var slow atomic.Bool
		b := runBubble(t, ln, Options{
			Plain: echo("plain"),
			TLS: HandlerFunc(func(_ context.Context, c *sniff.Conn, _ Establish) {
				defer func() { _ = c.Close() }()
				_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
				_, err := c.Hello()
				slow.Store(errors.Is(err, os.ErrDeadlineExceeded))
			}),
		})
		drip := dialMem(t, ln, "\x16\x03\x01\x02\x00\x01")
		for range 20 {
			_, _ = drip.Write([]byte{0})
			began := time.Now()
			if got, err := io.ReadAll(dialMem(t, ln, "x")); string(got) != "plain x" || time.Since(began) != 0 {
				t.Fatalf("meanwhile another was answered %q, %v after %v", got, err, time.Since(began))
			}
			<-time.After(time.Second)
		}
		if !slow.Load() {
			t.Error("the slow hello did not run into its deadline")
		}
		b.wantStop(t, 0)
	})
}

// Who is not established has nothing to lose: a stranger's silence, or half of a
// hello, must not make each stop last until the end of the drain.
func TestStrangersDoNotDelayTheStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{TLS: HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
			if _, err := c.Hello(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the hello ended with %v", err)
			}
			<-ctx.Done()
			if establish(false) {
				t.Error("established after the stop")
			}
			_ = c.Close()
		})})
		silent, half := dialMem(t, ln, ""), dialMem(t, ln, "\x16\x03\x01\x02\x00\x01")
		b.wantStop(t, 0)
		for _, c := range []net.Conn{silent, half} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a stranger reads %v, want a reset", err)
			}
		}
		if got := b.refused(); len(got) != 0 {
			t.Errorf("the drain was counted as a peer's doing: %v", got)
		}
	})
}

// lasting is a handler of connections that end when they are told to.
func lasting(told func()) Handler {
	return HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
		establish(true)
		<-ctx.Done()
		told()
		_ = c.Close()
	})
}

// Packet connections are told to go when all else that is established has gone,
// whoever holds it, and not before.
func TestLastingConnectionsGoLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		var began time.Time
		var toldAfter time.Duration
		b := runBubble(t, ln, Options{
			TLS: lasting(func() { toldAfter = time.Since(began) }),
			Plain: HandlerFunc(func(_ context.Context, c *sniff.Conn, establish Establish) {
				establish(false)
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}),
			Drain: func(context.Context) { <-time.After(3 * time.Second) },
		})
		dialMem(t, ln, "\x16")
		plain := dialMem(t, ln, "x")
		synctest.Wait()
		began = time.Now()
		time.AfterFunc(2*time.Second, func() { _ = plain.Close() })
		b.wantStop(t, 3*time.Second)
		if toldAfter != 3*time.Second {
			t.Errorf("told to go after %v, want 3 s", toldAfter)
		}
	})
}

// One that does not go when it is told to has its time, and is cut off.
func TestLingeringIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{TLS: HandlerFunc(func(_ context.Context, c *sniff.Conn, establish Establish) {
			establish(true)
			_, _ = io.Copy(io.Discard, c)
		})})
		c := dialMem(t, ln, "\x16")
		b.wantStop(t, DefaultLingerTimeout)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the peer reads %v, want a reset", err)
		}
	})
}

// Strangers who fill the room for what is not established push each other out,
// and nobody who has come in.
func TestPendingConnectionsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{MaxPending: 3, Plain: lasting(func() {}), TLS: HandlerFunc(func(ctx context.Context, c *sniff.Conn, _ Establish) {
			<-ctx.Done()
			_ = c.Close()
		})})
		in := dialMem(t, ln, "x")
		synctest.Wait()
		var strangers []*memnet.Conn
		for i := range 5 {
			strangers = append(strangers, dialMem(t, ln, []string{"\x16", ""}[i%2]))
			synctest.Wait()
		}
		for i, c := range strangers {
			_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
			want := os.ErrDeadlineExceeded
			if i < 2 {
				want = syscall.ECONNRESET
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
				t.Errorf("stranger %d reads %v, want %v", i, err, want)
			}
		}
		_ = in.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := in.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the one that had come in reads %v", err)
		}
		if got := b.refused(); len(got) != 1 || got[reasonLimitPending] != 2 {
			t.Errorf("refused: %v", got)
		}
		if open := testutil.ToFloat64(b.m.open); open != 4 {
			t.Errorf("%v connections open, want 4", open)
		}
		b.wantStop(t, 0)
	})
}

// The source that has the most makes room.
func TestRoomIsMadeByWhoHasTheMost(t *testing.T) {
	p := pending{max: 4}
	one, many := sourceOf(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}), sourceOf(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 2)})
	first := &Place{source: one}
	for _, c := range []*Place{first, {source: many}, {source: many}, {source: one}} {
		if out, ok := p.add(c); out != nil || !ok {
			t.Fatalf("there was room: %v, %v", out, ok)
		}
	}
	last := &Place{source: many}
	if out, _ := p.add(last); out != first {
		t.Errorf("with two each, %v made room, want the oldest", out)
	}
	if out, _ := p.add(&Place{source: one}); out == nil || out.source != many || out == last {
		t.Errorf("%v made room, want the oldest of those with three", out)
	}
	if p.remove(first) || !p.remove(last) || len(p.close()) != 3 || len(p.sources) != 0 {
		t.Errorf("left: %v", p.sources)
	}
	if _, ok := p.add(first); ok {
		t.Error("let in after the close")
	}
}

func TestDrainCutsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		h := HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
			establish(false)
			<-ctx.Done()
			if _, err := c.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is open when the context has ended: %v", err)
			}
		})
		b := runBubble(t, ln, Options{TLS: h})
		c := dialMem(t, ln, "\x16")
		b.wantStop(t, DefaultDrainTimeout)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the peer reads %v, want a reset", err)
		}
		lines := b.log.FilterMessage("connections cut off at the end of the drain").All()
		if len(lines) != 1 || lines[0].Level != zap.InfoLevel || lines[0].ContextMap()["connections"] != int64(1) {
			t.Errorf("log: %v", lines)
		}
	})
}

// A handler that nothing can move does not keep the process from its end.
func TestStuckHandlerIsLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		free, left := make(chan struct{}), make(chan struct{})
		b := runBubble(t, ln, Options{TLS: HandlerFunc(func(_ context.Context, _ *sniff.Conn, establish Establish) {
			establish(false)
			<-free
			close(left)
		})})
		dialMem(t, ln, "\x16")
		if took, err := b.stopped(); err == nil || took != DefaultDrainTimeout+AbortTimeout {
			t.Errorf("Run returned %v after %v, want an error after both limits", err, took)
		}
		close(free)
		<-left
	})
}

// A listener that ends by itself is a stop too, and an error.
func TestListenerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := memnet.Listen()
		b := runBubble(t, ln, Options{TLS: HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
			establish(false)
			<-ctx.Done()
			_ = c.Close()
		})})
		defer b.stop()
		dialMem(t, ln, "\x16")
		synctest.Wait()
		_ = ln.Close()
		if err := <-b.done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v, want net.ErrClosed", err)
		}
	})
}

// lateListener has one more connection when it is closed already.
type lateListener struct {
	*memnet.Listener
	late  net.Conn
	given atomic.Bool
}

func (l *lateListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil && !l.given.Swap(true) {
		return l.late, nil
	}
	return c, err
}

func TestConnectionAsTheDrainBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := memnet.Pipe()
		b := runBubble(t, &lateListener{Listener: memnet.Listen(), late: server}, Options{TLS: echo("tls")})
		b.wantStop(t, 0)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the peer reads %v, want a reset", err)
		}
	})
}

// brokenListener fails to accept as often as it is told to, and notes when it
// was asked.
type brokenListener struct {
	*memnet.Listener
	failures int
	asked    []time.Time
}

func (l *brokenListener) Accept() (net.Conn, error) {
	l.asked = append(l.asked, time.Now())
	if l.failures > 0 {
		l.failures--
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestAcceptBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &brokenListener{Listener: memnet.Listen(), failures: 10}
		b := runBubble(t, ln, Options{TLS: echo("tls"), MaxConns: 1}) // a place that is lost would be missed
		if got, err := io.ReadAll(dialMem(t, ln.Listener, "\x16")); string(got) != "tls \x16" {
			t.Errorf("after the errors: %q, %v", got, err)
		}
		synctest.Wait()
		var waits []time.Duration
		for i := range ln.asked[1:11] {
			waits = append(waits, ln.asked[i+1].Sub(ln.asked[i])/time.Millisecond)
		}
		if want := []time.Duration{5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000}; !slices.Equal(waits, want) {
			t.Errorf("waited %d ms, want %d", waits, want)
		}
		if n := testutil.ToFloat64(b.m.acceptErrors); n != 10 {
			t.Errorf("%v accept errors were counted, want 10", n)
		}
		if lines := b.log.FilterMessage("accept").Len(); lines != 1 {
			t.Errorf("%d log lines, want 1", lines)
		}
		b.wantStop(t, 0)
	})
}

// A stop does not wait for a back-off to end, nor for a place.
func TestStopWhileNotAccepting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := runBubble(t, &brokenListener{Listener: memnet.Listen(), failures: 1 << 30}, Options{TLS: echo("tls")})
		<-time.After(time.Minute + 300*time.Millisecond)
		b.wantStop(t, 0)

		ln := memnet.Listen()
		b = runBubble(t, ln, Options{MaxConns: 1, TLS: HandlerFunc(func(ctx context.Context, c *sniff.Conn, establish Establish) {
			establish(false)
			<-ctx.Done()
			_ = c.Close()
		})})
		dialMem(t, ln, "\x16")
		b.wantStop(t, DefaultDrainTimeout)
	})
}

// countingListener counts connections that were accepted and not closed yet.
type countingListener struct {
	*memnet.Listener
	open, most atomic.Int64
}

type countedConn struct {
	net.Conn
	l    *countingListener
	once atomic.Bool
}

func (c *countedConn) Close() error {
	if !c.once.Swap(true) {
		c.l.open.Add(-1)
	}
	return c.Conn.Close()
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.most.Store(max(l.most.Load(), l.open.Add(1)))
	return &countedConn{Conn: c, l: l}, nil
}

// Not even between Accept and its handler is there one connection too many.
func TestMaxConnsIsNeverExceeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &countingListener{Listener: memnet.Listen()}
		b := runBubble(t, ln, Options{MaxConns: 3, TLS: HandlerFunc(func(_ context.Context, c *sniff.Conn, _ Establish) {
			<-time.After(time.Second)
			_ = c.Close()
		})})
		began := time.Now()
		var clients []*memnet.Conn
		for range 30 {
			clients = append(clients, dialMem(t, ln.Listener, "\x16"))
		}
		synctest.Wait()
		if open := testutil.ToFloat64(b.m.open); open != 3 {
			t.Errorf("%v connections are counted as open, want 3", open)
		}
		for _, c := range clients {
			_, _ = io.Copy(io.Discard, c)
		}
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("30 connections, 3 at once, took %v, want 10 s", took)
		}
		if most := ln.most.Load(); most != 3 {
			t.Errorf("%d connections were open at once, want 3", most)
		}
		if lines := b.log.FilterMessage("no more connections are accepted until one ends").Len(); lines == 0 || lines > 2 {
			t.Errorf("%d log lines about it, want one in ten seconds", lines)
		}
		b.wantStop(t, 0)
	})
}

func TestAllReasonsAreThereAtZero(t *testing.T) {
	reg := prometheus.NewRegistry()
	NewMetrics(reg, "hello_timeout")
	for name, want := range map[string]int{"culvert_mux_refused_total": 6, "culvert_mux_accepted_total": 2} {
		if n, err := testutil.GatherAndCount(reg, name); err != nil || n != want {
			t.Errorf("%s has %d series, %v, want %d", name, n, err, want)
		}
	}
}
