package packet

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
)

// inBubble runs f under a fake clock. Time passes with after.
func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// after lets d pass on the fake clock.
func after(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestLinkRecords(t *testing.T) {
	packets := parseHex(t, "00000005 68656c6c6f 00000003 010203") // the example of docs/wire.md
	for _, tc := range []struct {
		name     string
		coalesce bool
		want     [][]byte
	}{
		{"native", false, [][]byte{packets[:9], packets[9:]}},
		{"culvert", true, [][]byte{packets}},
	} {
		inBubble(t, tc.name, func(t *testing.T) {
			b := newBed(t, tc.coalesce, LinkOptions{})
			b.hang.Store(true)
			b.Send([]byte("hello"), false)
			synctest.Wait()
			b.Send([]byte{1, 2, 3}, false)
			b.hang.Store(false)
			b.Kick()
			after(100 * time.Millisecond)
			b.peer(t)
			got := (<-b.dialled).recorded()
			if len(got) != len(tc.want) {
				t.Fatalf("%d writes, want %d", len(got), len(tc.want))
			}
			for i := range got {
				if !bytes.Equal(got[i], tc.want[i]) {
					t.Errorf("write %d is % x, want % x", i, got[i], tc.want[i])
				}
			}
		})
	}
}

func TestLinkCoalescesToOneRecord(t *testing.T) {
	for _, coalesce := range []bool{true, false} {
		inBubble(t, fmt.Sprint(coalesce), func(t *testing.T) {
			b := newBed(t, coalesce, LinkOptions{})
			b.Send([]byte("first"), false)
			far := b.peer(t)
			near := <-b.dialled
			near.block()
			var want []string
			for i := range 60 {
				want = append(want, strings.Repeat(string(rune('a'+i%26)), 1+i*50))
			}
			want[30] = strings.Repeat("x", 20000) // longer than a record: alone
			for _, p := range want {
				b.Send([]byte(p), false)
			}
			synctest.Wait()
			near.unblock()
			wantFrames(t, far, append([]string{"first"}, want...)...)
			writes := near.recorded()
			for _, w := range writes {
				d := model(w)
				if d.err != io.EOF {
					t.Fatal("a write does not hold whole frames")
				}
				if len(d.payloads) > 1 && (!coalesce || len(w) > maxRecord) {
					t.Fatalf("a write of %d frames and %d bytes", len(d.payloads), len(w))
				}
			}
			if coalesce && len(writes) > 12 {
				t.Errorf("%d writes: waiting frames do not share", len(writes))
			}
		})
	}
}

func TestLinkDropsOldestWhenFull(t *testing.T) {
	inBubble(t, "512", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.hang.Store(true)
		var want []string
		for i := range 520 {
			b.Send(fmt.Append(nil, i), false)
			if i >= 8 {
				want = append(want, fmt.Sprint(i))
			}
		}
		synctest.Wait()
		if n := b.Status().QueueLen; n != 512 {
			t.Fatalf("%d packets wait, want 512", n)
		}
		b.hang.Store(false)
		b.Kick()
		after(100 * time.Millisecond)
		wantFrames(t, b.peer(t), want...)
		b.wantDrops(t, map[string]uint64{"queue_full": 8})
		if st := b.Status(); st.PacketsSent != 512 || st.QueueLen != 0 {
			t.Fatalf("status %+v", st)
		}
	})
}

func TestLinkDropsOld(t *testing.T) {
	inBubble(t, "2s", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.hang.Store(true)
		b.Send([]byte("old"), false)
		after(time.Second)
		b.Send([]byte("young"), false)
		after(1001 * time.Millisecond)
		b.hang.Store(false)
		b.Kick()
		after(100 * time.Millisecond)
		wantFrames(t, b.peer(t), "young")
		b.wantDrops(t, map[string]uint64{"expired": 1})
	})
}

func TestLinkQueueOfDeadPeerStaysSmall(t *testing.T) {
	inBubble(t, "dead", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.fail.Store(true)
		for range 300 {
			b.Send([]byte("x"), false)
			after(100 * time.Millisecond)
		}
		if n := b.Status().QueueLen; n > 21 {
			t.Fatalf("%d packets wait for a dead peer, want 2 s of them", n)
		}
	})
}

func TestLinkSendRefusesWhatNoFrameCarries(t *testing.T) {
	inBubble(t, "sizes", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send(nil, false)
		b.Send(make([]byte, MaxPayload+1), false)
		b.wantDrops(t, map[string]uint64{"empty": 1, "oversize": 1})
		b.wantState(t, stateIdle)
		b.Send(make([]byte, MaxPayload), false)
		wantFrames(t, b.peer(t), string(make([]byte, MaxPayload)))
	})
}

func TestLinkBackoff(t *testing.T) {
	inBubble(t, "fails", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.fail.Store(true)
		b.wantState(t, stateIdle)
		if b.dials.Load() != 0 {
			t.Fatal("dialled with nothing to send")
		}
		b.Send([]byte("x"), false)
		b.wantState(t, stateDown)
		after(30 * time.Second)
		limit := shortestBackoff
		for i := 1; i < len(b.times); i++ {
			gap := b.times[i].Sub(b.times[i-1])
			if gap < limit/2 || gap > limit {
				t.Fatalf("pause %d is %v, want %v to %v", i, gap, limit/2, limit)
			}
			limit = min(2*limit, longestBackoff)
		}
		// Nobody sends any more: dialling ended with the warm time.
		if last := b.times[len(b.times)-1].Sub(b.times[0]); last > warmFor || last < warmFor-longestBackoff {
			t.Fatalf("the last dial came %v after the packet, want about %v", last, warmFor)
		}
		b.wantState(t, stateDown)
		if st := b.Status(); st.LastError != "dial: no path" {
			t.Fatalf("last error %q", st.LastError)
		}
		if n := b.logs.FilterLevelExact(zap.WarnLevel).Len(); n != 1 {
			t.Fatalf("%d warnings, want one for the whole failure", n)
		}
		b.fail.Store(false)
		b.Send([]byte("y"), false)
		after(time.Second)
		wantFrames(t, b.peer(t), "y")
		b.wantState(t, stateUp)
	})
}

func TestLinkDialBudget(t *testing.T) {
	inBubble(t, "10s", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.hang.Store(true)
		b.Send([]byte("x"), false)
		b.wantState(t, stateDialing)
		after(defaultDialTimeout - time.Millisecond)
		if n := b.dials.Load(); n != 1 {
			t.Fatalf("%d dials at once", n)
		}
		after(time.Millisecond)
		b.wantState(t, stateDown)
	})
}

func TestLinkIdle(t *testing.T) {
	for _, coalesce := range []bool{true, false} {
		inBubble(t, fmt.Sprint(coalesce), func(t *testing.T) {
			b := newBed(t, coalesce, LinkOptions{})
			b.Send([]byte("1"), false)
			far := b.peer(t)
			after(60 * time.Second)
			b.Send([]byte("2"), false)
			after(defaultIdleTimeout - time.Millisecond)
			b.wantState(t, stateUp)
			if err := ended(far); err != nil {
				t.Fatalf("ended before the idle limit: %v", err)
			}
			after(time.Millisecond)
			b.wantState(t, stateIdle)
			if err := ended(far); err != io.EOF {
				t.Fatalf("ended with %v, want a graceful end", err)
			}
			after(time.Minute)
			if n := b.dials.Load(); n != 1 {
				t.Fatalf("%d dials, want no new one for an idle link", n)
			}
			wantFrames(t, far, "1", "2")
			b.Send([]byte("3"), false)
			wantFrames(t, b.peer(t), "3")
			if st := b.Status(); st.LastError != "" {
				t.Fatalf("idle is no error: %q", st.LastError)
			}
		})
	}
}

func TestLinkStop(t *testing.T) {
	inBubble(t, "graceful", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("1"), false)
		far := b.peer(t)
		b.stop()
		if err := ended(far); err != io.EOF {
			t.Fatalf("ended with %v, want a graceful end", err)
		}
		b.Send([]byte("2"), false)
		b.wantDrops(t, map[string]uint64{"closed": 1})
		b.wantState(t, stateDown)
	})
	inBubble(t, "while writing", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("1"), false)
		far := b.peer(t)
		(<-b.dialled).block()
		b.Send([]byte("2"), false)
		synctest.Wait()
		b.Send([]byte("3"), false)
		start := time.Now()
		b.stop()
		if d := time.Since(start); d != 0 {
			t.Fatalf("a stuck write held up the stop for %v", d)
		}
		b.wantDrops(t, map[string]uint64{"closed": 2})
		if err := ended(far); err != syscall.ECONNRESET {
			t.Fatalf("ended with %v: half a frame must not end gracefully", err)
		}
	})
	inBubble(t, "while dialling and while pausing", func(t *testing.T) {
		for _, fail := range []bool{true, false} {
			b := newBed(t, true, LinkOptions{})
			b.fail.Store(fail)
			b.hang.Store(!fail)
			b.Send([]byte("1"), false)
			synctest.Wait()
			start := time.Now()
			b.stop()
			if d := time.Since(start); d != 0 {
				t.Fatalf("the stop took %v", d)
			}
			b.wantDrops(t, map[string]uint64{"closed": 1})
		}
	})
}

func TestLinkMetrics(t *testing.T) {
	inBubble(t, "counts", func(t *testing.T) {
		m := NewMetrics(nil)
		b := newBed(t, true, LinkOptions{Metrics: m})
		b.Send([]byte("four"), false)
		b.Send(nil, false)
		b.peer(t)
		for name, got := range map[string]float64{
			"frames": testutil.ToFloat64(m.frames.WithLabelValues("out", "dc2", "bob")) - 1,
			"bytes":  testutil.ToFloat64(m.bytes.WithLabelValues("out", "dc2", "bob")) - 4,
			"drops":  testutil.ToFloat64(m.drops.WithLabelValues("out", "empty")) - 1,
		} {
			if got != 0 {
				t.Errorf("%s is off by %v", name, got)
			}
		}
	})
}

func TestSendAllocates(t *testing.T) {
	for _, size := range []int{100, 1400, 9000} {
		l := NewLink(nil, LinkOptions{QueueFrames: 16})
		p := make([]byte, size)
		for range 32 {
			l.Send(p, false)
		}
		if n := testing.AllocsPerRun(200, func() { l.Send(p, false) }); n != 0 {
			t.Errorf("%v allocations for a packet of %d bytes", n, size)
		}
		// And where a writer takes them.
		flight := make([]frame, 0, 16)
		if n := testing.AllocsPerRun(200, func() {
			l.Send(p, false)
			flight = l.take(flight[:0], true, maxRecord)
			l.mu.Lock()
			for _, f := range flight {
				l.queue.recycle(f)
			}
			l.mu.Unlock()
		}); n != 0 {
			t.Errorf("%v allocations for a packet of %d bytes that is taken", n, size)
		}
	}
}

func TestQueueKeepsOrderAndBounds(t *testing.T) {
	q := queue{max: 10}
	next, want := 0, 0
	for round := range 50 {
		for range round % 10 {
			if q.full() {
				break
			}
			q.push(fmt.Append(nil, next), time.Time{})
			next++
		}
		for range (round * 7) % 8 {
			if q.oldest() == nil {
				break
			}
			f := q.pop()
			if round%3 == 0 && q.unpop(f) {
				f = q.pop()
			}
			if got := string(f.buf[HeaderLen:]); got != fmt.Sprint(want) {
				t.Fatalf("got %s, want %d", got, want)
			}
			want++
			q.recycle(f)
		}
		if len(q.ring) > 10 || q.spare > maxFree {
			t.Fatalf("ring of %d, %d bytes spare", len(q.ring), q.spare)
		}
	}
	for range 10 {
		q.recycle(frame{buf: make([]byte, 64<<10)})
	}
	if q.spare > maxFree {
		t.Fatalf("%d bytes spare, over %d", q.spare, maxFree)
	}
	for q.oldest() != nil {
		q.pop()
	}
	q.trim()
	if q.ring != nil || q.free != nil {
		t.Fatal("trim keeps memory")
	}
}

func BenchmarkSend(b *testing.B) {
	for _, size := range []int{100, 1400} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			l := NewLink(nil, LinkOptions{})
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				l.Send(p, false)
			}
		})
	}
}
