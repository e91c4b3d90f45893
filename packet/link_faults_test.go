package packet

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestLinkStalledPeerDelaysNoOther(t *testing.T) {
	inBubble(t, "stall", func(t *testing.T) {
		stuck, good := newBed(t, true, LinkOptions{}), newBed(t, true, LinkOptions{})
		stuck.Send([]byte("first"), false)
		good.Send([]byte("first"), false)
		stuckFar, far := stuck.peer(t), good.peer(t)
		(<-stuck.dialled).block()
		want := []string{"first"}
		for i := range 50 {
			stuck.Send([]byte("lost"), false)
			good.Send(fmt.Append(nil, i), false)
			want = append(want, fmt.Sprint(i))
		}
		wantFrames(t, far, want...) // no time has passed
		wantFrames(t, stuckFar, "first")
		after(defaultWriteTimeout - time.Millisecond)
		stuck.wantState(t, stateUp)
		after(time.Millisecond)
		if err := ended(stuckFar); err != syscall.ECONNRESET {
			t.Fatalf("the stalled connection ended with %v, want a reset", err)
		}
		if st := stuck.Status(); !strings.Contains(st.LastError, "write frame") {
			t.Fatalf("last error %q", st.LastError)
		}
		stuck.Send([]byte("next"), false)
		wantFrames(t, stuck.peer(t), "next")
		stuck.wantDrops(t, map[string]uint64{"expired": 50})
	})
}

func TestLinkNoticesClosedConnection(t *testing.T) {
	for _, coalesce := range []bool{true, false} {
		for _, quiet := range []time.Duration{2 * time.Second, 30 * time.Second} {
			inBubble(t, fmt.Sprint(coalesce, quiet), func(t *testing.T) {
				b := newBed(t, coalesce, LinkOptions{})
				b.Send([]byte("1"), false)
				far := b.peer(t)
				wantFrames(t, far, "1")
				after(quiet)
				if err := far.Close(); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				wantDials := int32(1)
				if quiet < warmFor {
					wantDials = 2 // in use lately: at once, so that the next packet does not wait
				}
				if n := b.dials.Load(); n != wantDials {
					t.Fatalf("%d dials after the end, want %d", n, wantDials)
				}
				b.Send([]byte("2"), false)
				wantFrames(t, b.peer(t), "2")
				b.wantDrops(t, map[string]uint64{})
			})
		}
	}
}

func TestLinkRedialsFlappingPeerWithBackoff(t *testing.T) {
	inBubble(t, "flap", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("x"), false)
		until := time.Now().Add(5 * time.Second)
		for time.Now().Before(until) {
			select {
			case far := <-b.peers:
				if _, err := far.Write(AppendFrame(nil, nil)); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				far.Abort()
			case <-time.After(10 * time.Millisecond):
			}
		}
		if n := b.dials.Load(); n > 14 {
			t.Fatalf("%d dials in 5 s to a peer that answers and ends", n)
		}
	})
}

func TestLinkRetriesOnce(t *testing.T) {
	inBubble(t, "reset while writing", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("first"), false)
		far, near := b.peer(t), <-b.dialled
		after(time.Minute / 2)
		near.block()
		b.Send([]byte("a"), false)
		synctest.Wait()
		b.Send([]byte("b"), false)
		far.Abort()
		wantFrames(t, b.peer(t), "a", "b")
		b.wantDrops(t, map[string]uint64{})
		if st := b.Status(); st.PacketsSent != 3 || st.BytesSent != 7 || !strings.Contains(st.LastError, "reset") {
			t.Fatalf("status %+v", st)
		}
	})
	inBubble(t, "twice", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("first"), false)
		far, near := b.peer(t), <-b.dialled
		after(30 * time.Second)
		near.block()
		b.Send([]byte("a"), false)
		synctest.Wait()
		b.hang.Store(true) // so that the second connection can be blocked before its first write
		far.Abort()
		synctest.Wait()
		near2, far2 := testPair(true)
		near2.block()
		b.dial = func(context.Context) (Conn, error) { return near2, nil }
		b.Kick()
		after(100 * time.Millisecond)
		far2.Abort()
		synctest.Wait()
		b.wantDrops(t, map[string]uint64{"write_error": 1})
	})
}

func TestLinkRefused(t *testing.T) {
	inBubble(t, "closed unanswered", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("lost"), false)
		synctest.Wait()
		far := <-b.peers
		b.wantState(t, stateDialing)
		if st := b.Status(); st.PacketsSent != 0 {
			t.Fatal("counted as sent before the answer")
		}
		wantFrames(t, far, "lost") // written without waiting for the answer
		b.fail.Store(true)
		far.Abort()
		b.wantState(t, stateDown)
		b.wantDrops(t, map[string]uint64{"refused": 1})
		st := b.Status()
		if st.PacketsSent != 0 || st.BytesSent != 0 || !strings.HasPrefix(st.LastError, "connection ended unanswered: ") {
			t.Fatalf("status %+v", st)
		}
		if n := b.dials.Load(); n != 1 {
			t.Fatal("dialled again without a pause")
		}
	})
	inBubble(t, "no answer", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("lost"), false)
		after(answerTimeout - time.Millisecond)
		b.wantState(t, stateDialing)
		after(time.Millisecond)
		b.wantState(t, stateDown)
		if st := b.Status(); st.LastError != "no answer in 5s" || st.Drops["refused"] != 1 {
			t.Fatalf("status %+v", st)
		}
	})
	inBubble(t, "what it said is kept when a write fails first", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Send([]byte("first"), false)
		synctest.Wait()
		far, near := <-b.peers, <-b.dialled
		near.block()
		b.Send([]byte("x"), false)
		synctest.Wait()
		b.fail.Store(true)
		far.in.update(func() { far.in.err = syscall.EPIPE }) // the write ends, the reason is under way
		synctest.Wait()
		after(lastWords / 2)
		far.Abort()
		b.wantState(t, stateDown)
		if st := b.Status(); !strings.Contains(st.LastError, "ended unanswered: connection reset") {
			t.Fatalf("last error %q", st.LastError)
		}
	})
}

func TestLinkClosesOnWhatItDidNotAskFor(t *testing.T) {
	for _, coalesce := range []bool{true, false} {
		inBubble(t, fmt.Sprint(coalesce), func(t *testing.T) {
			b := newBed(t, coalesce, LinkOptions{})
			b.Send([]byte("x"), false)
			far := b.peer(t)
			var sent []byte
			if coalesce {
				sent = []byte("data")
				if _, err := far.Write(AppendFrame(nil, nil)); err != nil { // further empty frames are welcome
					t.Fatal(err)
				}
				b.wantState(t, stateUp)
			}
			if _, err := far.Write(AppendFrame(nil, sent)); err != nil {
				t.Fatal(err)
			}
			if err := ended(far); err != syscall.ECONNRESET {
				t.Fatalf("ended with %v, want a reset", err)
			}
			if st := b.Status(); st.LastError != errUnasked.Error() {
				t.Fatalf("last error %q", st.LastError)
			}
		})
	}
}

func TestLinkKick(t *testing.T) {
	inBubble(t, "connection", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.Kick() // nothing to end
		b.Send([]byte("1"), false)
		far, near := b.peer(t), <-b.dialled
		after(2 * time.Second)
		near.block()
		b.Send([]byte("2"), false)
		synctest.Wait()
		b.Kick()
		if err := ended(far); err != syscall.ECONNRESET {
			t.Fatalf("ended with %v, want a reset", err)
		}
		wantFrames(t, b.peer(t), "2")
		if st := b.Status(); st.LastError != errKicked.Error() {
			t.Fatalf("last error %q", st.LastError)
		}
	})
	inBubble(t, "dial", func(t *testing.T) {
		b := newBed(t, true, LinkOptions{})
		b.hang.Store(true)
		b.Send([]byte("1"), false)
		after(time.Second)
		b.hang.Store(false)
		b.Kick()
		after(shortestBackoff)
		wantFrames(t, b.peer(t), "1")
	})
}
