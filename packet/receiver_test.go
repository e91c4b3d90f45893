package packet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/catalog"
)

// serving is one Receiver.Serve at work.
type serving struct {
	far  *testConn // the sender's end
	got  []string  // delivered
	done chan struct{}
	err  error // of Serve, after done
	stop context.CancelFunc
}

func serve(t *testing.T, r *Receiver, coalesce bool, verdict func(string) error) *serving {
	far, near := testPair(coalesce)
	ctx, cancel := context.WithCancel(t.Context())
	s := &serving{far: far, done: make(chan struct{}), stop: cancel}
	t.Cleanup(func() {
		cancel()
		_ = far.Close()
		<-s.done
	})
	go func() {
		defer close(s.done)
		s.err = r.Serve(ctx, near, bob(), nil, func(packets [][]byte) (int, error) {
			for i, p := range packets {
				if verdict != nil {
					if err := verdict(string(p)); err != nil {
						return i, err
					}
				}
				s.got = append(s.got, string(p))
			}
			return len(packets), nil
		})
	}()
	synctest.Wait()
	return s
}

func (s *serving) write(t *testing.T, b []byte) {
	t.Helper()
	if _, err := s.far.Write(b); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// result returns what Serve returned, which it must have.
func (s *serving) result(t *testing.T) error {
	t.Helper()
	synctest.Wait()
	select {
	case <-s.done:
		return s.err
	default:
		t.Fatal("Serve goes on")
		return nil
	}
}

// TestReceiverNativeFrames: frames kept as hex, split at every byte, are delivered whole, unchanged, in order.
func TestReceiverNativeFrames(t *testing.T) {
	in := readHex(t, "testdata/native.hex")
	var want []string
	for _, p := range model(in).payloads {
		if len(p) > 0 {
			want = append(want, string(p))
		}
	}
	if len(want) != 4 || len(want[0]) != 22 || len(want[1]) != 18 || want[2] != "\xff" || len(want[3]) != 11 {
		t.Fatalf("testdata/native.hex is read as %q", want)
	}
	check := func(t *testing.T, s *serving) {
		t.Helper()
		if err := s.far.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.result(t); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprintf("%q", s.got) != fmt.Sprintf("%q", want) {
			t.Fatalf("delivered %q, want %q", s.got, want)
		}
	}
	inBubble(t, "cut once, anywhere", func(t *testing.T) {
		for cut := range len(in) {
			s := serve(t, NewReceiver(ReceiverOptions{}), false, nil)
			s.write(t, in[:cut])
			s.write(t, in[cut:])
			check(t, s)
		}
	})
	inBubble(t, "cut at every byte", func(t *testing.T) {
		s := serve(t, NewReceiver(ReceiverOptions{}), false, nil)
		for i := range in {
			s.write(t, in[i:i+1])
		}
		if len(s.far.in.buf) > 0 {
			t.Fatalf("a native sender was sent % x", s.far.in.buf)
		}
		check(t, s)
	})
}

func TestReceiverAnswersFirst(t *testing.T) {
	inBubble(t, "culvert", func(t *testing.T) {
		s := serve(t, NewReceiver(ReceiverOptions{}), true, nil)
		if !bytes.Equal(s.far.in.buf, []byte{0, 0, 0, 0}) {
			t.Fatalf("answer is % x, want one empty frame", s.far.in.buf)
		}
	})
	inBubble(t, "to nobody", func(t *testing.T) {
		far, near := testPair(true)
		far.Abort()
		err := NewReceiver(ReceiverOptions{}).Serve(t.Context(), near, bob(), nil, nil)
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("got %v, want the reset", err)
		}
	})
}

func TestReceiverCounts(t *testing.T) {
	inBubble(t, "reasons", func(t *testing.T) {
		m := NewMetrics(nil)
		r := NewReceiver(ReceiverOptions{Metrics: m})
		verdict := func(p string) error {
			return map[string]error{
				"unknown":  ReasonUnknownPeer,
				"nodeless": fmt.Errorf("look up: %w", ReasonNoNode),
				"error":    errors.New("no buffer space"),
			}[p]
		}
		s := serve(t, r, true, verdict)
		s.write(t, AppendFrame(AppendFrame(nil, []byte("unknown")), []byte("nodeless")))
		s.write(t, oversize(MaxPayload+1))
		if n := testutil.CollectAndCount(m.frames) + len(r.sources); n != 0 {
			t.Fatal("a peer is known before a packet of it was delivered")
		}
		in := AppendFrame(AppendFrame(nil, []byte("good")), []byte("error"))
		in = append(in, oversize(MaxPayload+1)...)
		in = append(in, oversize(MaxFrame)...)
		s.write(t, AppendFrame(AppendFrame(in, nil), []byte("better")))

		got := r.Received(bob())
		if got.Packets != 2 || got.Bytes != 10 || fmt.Sprint(got.Drops) != "map[deliver_error:1 oversize:2]" {
			t.Fatalf("received %+v", got)
		}
		if fmt.Sprint(s.got) != "[good better]" {
			t.Fatalf("delivered %q", s.got)
		}
		for reason, want := range map[Reason]float64{
			ReasonUnknownPeer: 1, ReasonNoNode: 1, ReasonOversize: 3, ReasonDeliverError: 1,
		} {
			if n := testutil.ToFloat64(m.drops.WithLabelValues("in", string(reason))); n != want {
				t.Errorf("%s: %v, want %v", reason, n, want)
			}
		}
		if n := testutil.ToFloat64(m.bytes.WithLabelValues("in", "dc2", "bob")); n != 10 {
			t.Errorf("%v bytes counted", n)
		}

		r.Forget(bob())
		m.Forget(bob())
		if n := testutil.CollectAndCount(m.frames) + testutil.CollectAndCount(m.bytes); n != 0 {
			t.Fatalf("%d series of a forgotten peer", n)
		}
		if got := r.Received(bob()); got.Packets != 0 || got.Drops == nil {
			t.Fatalf("received %+v", got)
		}
		s.write(t, AppendFrame(nil, []byte("again"))) // it came back on a connection that had stayed
		if n := testutil.ToFloat64(m.frames.WithLabelValues("in", "dc2", "bob")); n != 1 || r.Received(bob()).Packets != 1 {
			t.Fatalf("%v frames of a peer that came back", n)
		}
	})
}

func TestReceiverEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []byte
		end  func(*testConn)
		want error
	}{
		{"closed", AppendFrame(nil, []byte("x")), func(c *testConn) { _ = c.CloseWrite() }, nil},
		{"cut", []byte{0, 0, 0, 9, 'x'}, func(c *testConn) { _ = c.CloseWrite() }, io.ErrUnexpectedEOF},
		{"reset", nil, (*testConn).Abort, syscall.ECONNRESET},
		{"too large", []byte{0, 0x40, 0, 1}, func(*testConn) {}, &FrameTooLargeError{}},
	} {
		inBubble(t, tc.name, func(t *testing.T) {
			s := serve(t, NewReceiver(ReceiverOptions{}), false, nil)
			s.write(t, tc.in)
			tc.end(s.far)
			err := s.result(t)
			if _, large := errors.AsType[*FrameTooLargeError](tc.want); large {
				if _, large := errors.AsType[*FrameTooLargeError](err); !large {
					t.Fatalf("got %v, want a FrameTooLargeError", err)
				}
			} else if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			wantEnd := io.EOF
			if tc.want != nil {
				wantEnd = syscall.ECONNRESET
			}
			if err := ended(s.far); !errors.Is(err, wantEnd) {
				t.Fatalf("the peer sees %v, want %v", err, wantEnd)
			}
		})
	}
}

func TestReceiverIdle(t *testing.T) {
	inBubble(t, "150s", func(t *testing.T) {
		s := serve(t, NewReceiver(ReceiverOptions{}), true, nil)
		after(100 * time.Second)
		s.write(t, AppendFrame(nil, nil)) // a keepalive is activity
		after(defaultReceiveIdle - time.Millisecond)
		if err := ended(s.far); err != nil {
			t.Fatalf("ended before the limit: %v", err)
		}
		after(time.Millisecond)
		if err := s.result(t); err != nil {
			t.Fatal(err)
		}
		if err := ended(s.far); err != io.EOF {
			t.Fatalf("ended with %v, want a graceful end", err)
		}
	})
	if defaultIdleTimeout >= 120*time.Second || defaultReceiveIdle <= defaultIdleTimeout {
		t.Fatal("a sender must give up before any receiver does")
	}
}

func TestReceiverDrain(t *testing.T) {
	inBubble(t, "takes what is under way", func(t *testing.T) {
		s := serve(t, NewReceiver(ReceiverOptions{}), true, nil)
		s.stop()
		if err := ended(s.far); err != io.EOF {
			t.Fatalf("the peer sees %v, want to be told at once", err)
		}
		after(100 * time.Millisecond)
		s.write(t, AppendFrame(nil, []byte("late")))
		if err := s.far.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.result(t); err != nil || fmt.Sprint(s.got) != "[late]" {
			t.Fatalf("delivered %q, %v", s.got, err)
		}
	})
	inBubble(t, "for a second", func(t *testing.T) { // a native sender does not see the end and goes on
		s := serve(t, NewReceiver(ReceiverOptions{}), false, nil)
		s.stop()
		for range 9 {
			after(lingerTimeout / 10)
			s.write(t, AppendFrame(nil, []byte("x")))
		}
		after(lingerTimeout/10 - time.Millisecond)
		select {
		case <-s.done:
			t.Fatal("ended early")
		default:
		}
		after(time.Millisecond)
		if err := s.result(t); err != nil || len(s.got) != 9 {
			t.Fatalf("delivered %d, %v", len(s.got), err)
		}
	})
	inBubble(t, "stopped before it began", func(t *testing.T) {
		_, near := testPair(true)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		if err := NewReceiver(ReceiverOptions{}).Serve(ctx, near, bob(), nil, nil); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d > lingerTimeout {
			t.Fatalf("took %v", d)
		}
	})
}

// TestRestartOfReceiverCostsNoPacket runs a link against receivers that are stopped and replaced under load.
func TestRestartOfReceiverCostsNoPacket(t *testing.T) {
	inBubble(t, "load", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		r := NewReceiver(ReceiverOptions{})
		var got []string
		accept := func() (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				select {
				case c := <-b.peers:
					if err := r.Serve(ctx, c, bob(), nil, func(packets [][]byte) (int, error) {
						for _, p := range packets {
							got = append(got, string(p))
						}
						return len(packets), nil
					}); err != nil {
						t.Errorf("Serve: %v", err)
					}
				case <-ctx.Done():
				}
			}()
			return func() { cancel(); <-done }
		}
		sent := 0
		send := func(n int) {
			for range n {
				b.Send(fmt.Append(nil, sent), false)
				sent++
				after(time.Millisecond)
			}
		}
		for range 5 {
			stop := accept()
			send(1500)
			b.Send(fmt.Append(nil, sent), false) // this one is under way when the stop comes
			sent++
			stop()
		}
		stop := accept()
		send(100)
		stop()
		b.stop()
		if len(got) != sent {
			t.Fatalf("%d of %d packets delivered, drops %v", len(got), sent, b.Status().Drops)
		}
		for i, p := range got {
			if p != fmt.Sprint(i) {
				t.Fatalf("packet %d is %q", i, p)
			}
		}
	})
}

func TestReceiverSeveralConnections(t *testing.T) {
	inBubble(t, "one peer", func(t *testing.T) {
		r := NewReceiver(ReceiverOptions{})
		x, y := serve(t, r, true, nil), serve(t, r, false, nil)
		x.write(t, AppendFrame(nil, []byte("x")))
		y.write(t, AppendFrame(nil, []byte("y")))
		if err := x.far.Close(); err != nil {
			t.Fatal(err)
		}
		if err := x.result(t); err != nil {
			t.Fatal(err)
		}
		y.write(t, AppendFrame(nil, []byte("z")))
		if got := r.Received(bob()); got.Packets != 3 || fmt.Sprint(x.got, y.got) != "[x] [y z]" {
			t.Fatalf("received %+v, delivered %q and %q", got, x.got, y.got)
		}
	})
}

func TestReceiverAllocates(t *testing.T) {
	const packets = 5000
	r := NewReceiver(ReceiverOptions{})
	in := bytes.Repeat(AppendFrame(nil, make([]byte, 1400)), packets)
	n := 0
	deliver := func(packets [][]byte) (int, error) { n += len(packets); return len(packets), nil }
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := r.Serve(t.Context(), &inputConn{Reader: bytes.NewReader(in)}, bob(), nil, deliver)
	runtime.ReadMemStats(&after)
	if err != nil || n != packets {
		t.Fatalf("%d packets, %v", n, err)
	}
	if got := after.Mallocs - before.Mallocs; got > 200 {
		t.Errorf("%d allocations for %d packets", got, packets)
	}
}

func BenchmarkReceive(b *testing.B) {
	const packets = 1000
	r := NewReceiver(ReceiverOptions{})
	in := bytes.Repeat(AppendFrame(nil, make([]byte, 1400)), packets)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		err := r.Serve(b.Context(), &inputConn{Reader: bytes.NewReader(in)}, bob(), nil, func(packets [][]byte) (int, error) { return len(packets), nil })
		if err != nil {
			b.Fatal(err)
		}
	}
}

// TestMetricsFromTheStart: each series of a closed set exists at zero, and no other does.
func TestMetricsFromTheStart(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := NewMetrics(reg)
	want := `# HELP culvert_packet_drops_total Packets dropped, by direction and reason.
# TYPE culvert_packet_drops_total counter
culvert_packet_drops_total{direction="in",reason="deliver_error"} 0
culvert_packet_drops_total{direction="in",reason="no_node"} 0
culvert_packet_drops_total{direction="in",reason="oversize"} 0
culvert_packet_drops_total{direction="in",reason="unknown_peer"} 0
culvert_packet_drops_total{direction="out",reason="closed"} 0
culvert_packet_drops_total{direction="out",reason="empty"} 0
culvert_packet_drops_total{direction="out",reason="expired"} 0
culvert_packet_drops_total{direction="out",reason="no_route"} 0
culvert_packet_drops_total{direction="out",reason="oversize"} 0
culvert_packet_drops_total{direction="out",reason="queue_full"} 0
culvert_packet_drops_total{direction="out",reason="refused"} 0
culvert_packet_drops_total{direction="out",reason="write_error"} 0
culvert_packet_drops_total{direction="out",reason="wrong_source"} 0
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Fatal(err)
	}
	m.DroppedOut(ReasonWrongSource)
	m.DroppedIn(ReasonNoNode)
	if testutil.ToFloat64(m.drops.WithLabelValues("out", "wrong_source"))+
		testutil.ToFloat64(m.drops.WithLabelValues("in", "no_node")) != 2 {
		t.Error("drops outside of the package are not counted")
	}
	NewLink(nil, LinkOptions{Peer: catalog.Key{Datacenter: "dc9", Node: "eve"}, Metrics: m})
	if n := testutil.CollectAndCount(m.frames); n != 1 {
		t.Errorf("%d series for one link, want its own at zero", n)
	}
}

// inputConn is a native connection on which the input lies ready.
type inputConn struct {
	net.Conn
	io.Reader
}

func (c *inputConn) Read(p []byte) (int, error)      { return c.Reader.Read(p) }
func (c *inputConn) Coalesce() bool                  { return false }
func (c *inputConn) Pending() bool                   { return false }
func (c *inputConn) Flush() error                    { return nil }
func (c *inputConn) Abort()                          {}
func (c *inputConn) Close() error                    { return nil }
func (c *inputConn) CloseWrite() error               { return nil }
func (c *inputConn) SetReadDeadline(time.Time) error { return nil }
