package packet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"culvert/internal/memnet"
	"culvert/internal/testpki"
)

// A native peer says nothing, so what a link knows of it is whether its connections last.

var errAlert = errors.New("refused by the far side: tls: bad certificate")

// refuse ends c as an alert of the peer does: reads tell it, writes still go out.
func refuse(c *testConn) { c.in.update(func() { c.in.err = errAlert }) }

// refuseAll refuses each connection of b for d, delay after it was dialled, while a packet is sent every 100 ms.
func refuseAll(b *bed, d, delay time.Duration) (sent int) {
	until, next := time.Now().Add(d), time.Now()
	for time.Now().Before(until) {
		if !time.Now().Before(next) {
			b.Send([]byte("x"), false)
			sent, next = sent+1, next.Add(100*time.Millisecond)
		}
		select {
		case c := <-b.dialled:
			time.AfterFunc(delay, func() { refuse(c) })
		default:
		}
		after(5 * time.Millisecond)
	}
	return sent
}

func TestNativeRefused(t *testing.T) {
	for _, delay := range []time.Duration{time.Millisecond, 900 * time.Millisecond} {
		inBubble(t, fmt.Sprint(delay), func(t *testing.T) {
			b := newBed(t, false, LinkOptions{})
			sent := refuseAll(b, 30*time.Second, delay)
			b.wantState(t, stateDown)
			b.stop()

			st := b.Status()
			if st.PacketsSent != 0 || st.BytesSent != 0 {
				t.Errorf("status %+v", st)
			}
			if want := "connection ended within 1s: " + errAlert.Error(); st.LastError != want {
				t.Errorf("last error %q, want %q", st.LastError, want)
			}
			var dropped uint64
			for _, n := range st.Drops {
				dropped += n
			}
			if dropped != uint64(sent) || st.Drops[string(ReasonRefused)] == 0 {
				t.Errorf("%d packets sent, dropped %v", sent, st.Drops)
			}
			if n := b.logs.FilterLevelExact(zap.WarnLevel).Len(); n != 1 || b.dials.Load() < 10 {
				t.Errorf("%d warnings for %d dials, want one", n, b.dials.Load())
			}
			if n := b.logs.FilterMessage("link up").Len(); n != 0 {
				t.Errorf("up %d times", n)
			}
			limit := shortestBackoff
			for i := 1; i < len(b.times); i++ {
				// Seen by refuseAll up to 5 ms late.
				gap := b.times[i].Sub(b.times[i-1]) - delay
				if gap < limit/2 || gap > limit+5*time.Millisecond {
					t.Fatalf("pause %d is %v, want %v to %v", i, gap, limit/2, limit)
				}
				limit = min(2*limit, longestBackoff)
			}
		})
	}
	inBubble(t, "down until one lasts", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{})
		refuseAll(b, time.Second, 0)
		b.wantState(t, stateDown)
		for len(b.dialled) == 0 {
			b.Send([]byte("y"), false)
			after(10 * time.Millisecond)
		}
		b.wantState(t, stateDown)
		after(stableAfter)
		b.wantState(t, stateUp)
	})
}

func TestNativeStays(t *testing.T) {
	inBubble(t, "up after a second", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{})
		start := time.Now()
		var want []string
		for i := range 20 {
			want = append(want, fmt.Sprintf("%02d", i))
			b.Send([]byte(want[i]), false)
			synctest.Wait()
			if n := b.Status().QueueLen; n != 0 {
				t.Fatalf("%d packets wait at %v", n, time.Since(start))
			}
			if up := time.Since(start) >= stableAfter; up {
				b.wantState(t, stateUp)
			} else if b.wantState(t, stateDialing); b.Status().PacketsSent != 0 {
				t.Fatal("counted as sent before the second")
			}
			after(100 * time.Millisecond)
		}
		wantFrames(t, b.peer(t), want...)
		after(answerTimeout + time.Minute) // quiet, but for longer than an answer may take
		b.wantState(t, stateUp)
		b.wantDrops(t, map[string]uint64{})
		st := b.Status()
		if st.PacketsSent != 20 || st.BytesSent != 40 || st.LastError != "" || b.dials.Load() != 1 {
			t.Fatalf("%d dials, status %+v", b.dials.Load(), st)
		}
		if got := st.Since.Sub(start); got != stableAfter {
			t.Fatalf("up since %v", got)
		}
	})
	inBubble(t, "while a write waits", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{})
		b.Send([]byte("first"), false)
		b.peer(t)
		(<-b.dialled).block()
		b.Send([]byte("stuck"), false)
		after(stableAfter)
		b.wantState(t, stateUp)
		if n := b.Status().PacketsSent; n != 1 {
			t.Fatalf("%d packets sent, want the one that was written", n)
		}
	})
}

func TestNativeEnds(t *testing.T) {
	for _, tc := range []struct {
		name  string
		after time.Duration
		end   func(far *testConn)
		want  LinkStatus
		dials int32 // at once
	}{
		{"early", 500 * time.Millisecond, func(far *testConn) { _ = far.Close() }, LinkStatus{
			State: stateDown, Drops: map[string]uint64{"refused": 1}, LastError: "connection ended within 1s: EOF",
		}, 1},
		{"early, by a reset", 999 * time.Millisecond, (*testConn).Abort, LinkStatus{
			State: stateDown, Drops: map[string]uint64{"refused": 1},
			LastError: "connection ended within 1s: " + syscall.ECONNRESET.Error(),
		}, 1},
		{"late", 2 * time.Second, func(far *testConn) { _ = far.Close() }, LinkStatus{
			State: stateDialing, PacketsSent: 1, BytesSent: 1,
		}, 2},
		{"late, by a reset", 1100 * time.Millisecond, (*testConn).Abort, LinkStatus{
			State: stateDialing, PacketsSent: 1, BytesSent: 1, LastError: "read: " + syscall.ECONNRESET.Error(),
		}, 2},
	} {
		inBubble(t, tc.name, func(t *testing.T) {
			b := newBed(t, false, LinkOptions{})
			b.Send([]byte("1"), false)
			far := b.peer(t)
			after(tc.after)
			tc.end(far)
			b.wantState(t, tc.want.State)
			b.wantDrops(t, tc.want.Drops)
			st := b.Status()
			if st.PacketsSent != tc.want.PacketsSent || st.BytesSent != tc.want.BytesSent || st.LastError != tc.want.LastError {
				t.Errorf("status %+v, want %+v", st, tc.want)
			}
			if n := b.dials.Load(); n != tc.dials {
				t.Errorf("%d dials, want %d", n, tc.dials)
			}
		})
	}
	inBubble(t, "a write fails, and the second passes meanwhile", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{})
		b.Send([]byte("1"), false)
		synctest.Wait()
		near := <-b.dialled
		after(stableAfter - lastWords/2)
		b.fail.Store(true)
		near.out.update(func() { near.out.err = syscall.EPIPE })
		b.Send([]byte("2"), false)
		after(lastWords)
		b.wantState(t, stateDown)
		if st := b.Status(); st.PacketsSent != 0 || !strings.HasPrefix(st.LastError, "write frame: ") {
			t.Fatalf("status %+v", st)
		}
	})
	inBubble(t, "kicked", func(t *testing.T) {
		b := newBed(t, false, LinkOptions{})
		b.Send([]byte("1"), false)
		b.peer(t)
		b.Kick()
		b.wantState(t, stateDown)
		b.wantDrops(t, map[string]uint64{"refused": 1})
	})
}

// tlsConn is a native connection over TLS, without what package alpn adds.
type tlsConn struct {
	*tls.Conn
	wire *memnet.Conn
}

func (c tlsConn) Coalesce() bool { return false }
func (c tlsConn) Abort()         { c.wire.Abort() }
func (c tlsConn) Pending() bool  { return false }
func (c tlsConn) Flush() error   { return nil }

// With crypto/tls a refusal comes after the handshake, and a read goes on after its deadline.
func TestNativeOverTLS(t *testing.T) {
	for _, refused := range []bool{true, false} {
		inBubble(t, fmt.Sprint("refused ", refused), func(t *testing.T) {
			ca := testpki.New(t, "consul")
			alice, server := ca.Leaf(t, testpki.Server("dc1", "alice")), ca.Leaf(t, testpki.Server("dc2", "bob"))
			far := &tls.Config{
				Certificates: []tls.Certificate{server.TLS}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
			}
			if refused {
				far.ClientCAs = testpki.New(t, "consul").Pool()
			}
			b := newBed(t, false, LinkOptions{})
			synctest.Wait()
			b.dial = func(ctx context.Context) (Conn, error) {
				x, y := memnet.Pipe()
				go func() { // what native servers do, for three seconds
					c := tls.Server(y, far)
					time.AfterFunc(3*time.Second, func() { _ = c.Close() })
					_, _ = io.Copy(io.Discard, c)
					_ = c.Close()
				}()
				c := tls.Client(x, &tls.Config{
					Certificates: []tls.Certificate{alice.TLS}, RootCAs: ca.Pool(), ServerName: server.Leaf.DNSNames[0],
				})
				return tlsConn{c, x}, c.HandshakeContext(ctx)
			}
			b.Send([]byte("x"), false)
			after(2 * time.Second)
			if refused {
				b.wantState(t, stateDown)
				if st := b.Status(); st.PacketsSent != 0 || !strings.Contains(st.LastError, "unknown certificate authority") {
					t.Errorf("status %+v", st)
				}
			} else {
				b.wantState(t, stateUp)
				after(1500 * time.Millisecond)
				b.wantState(t, stateDialing) // again: the end was seen
				if st := b.Status(); st.PacketsSent != 1 || st.LastError != "" {
					t.Errorf("status %+v", st)
				}
			}
			b.stop()
			after(5 * time.Second)
		})
	}
}
