package pipe

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"culvert/internal/testtcp"
)

// answerAndReset has a server that reads one byte of an endless request,
// answers and goes, which makes its kernel send a reset behind the answer. It
// reports whether the client got the answer, and the reset as one.
func answerAndReset(t *testing.T, client, server *net.TCPConn, answer []byte) (whole, reset bool) {
	t.Helper()
	wrote := make(chan error, 1)
	go func() {
		chunk := make([]byte, 16<<10)
		for {
			if _, err := client.Write(chunk); err != nil {
				wrote <- err
				return
			}
		}
	}()
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write(answer); err != nil {
		t.Fatal(err)
	}
	_ = server.SetLinger(0) // what is unread might just have been read
	_ = server.Close()
	got, err := io.ReadAll(client)
	werr := <-wrote
	// Whichever call sees the reset first takes the error with it.
	return bytes.Equal(got, answer), errors.Is(err, syscall.ECONNRESET) || errors.Is(werr, syscall.ECONNRESET)
}

func TestAnswerBeforeAReset(t *testing.T) {
	const runs = 100
	answer := randomBytes(8 << 10)
	count := func(pair func(t *testing.T) (client, server *net.TCPConn, end func())) (whole, resets int) {
		for range runs {
			client, server, end := pair(t)
			got, reset := answerAndReset(t, client, server, answer)
			end()
			_ = client.Close()
			if got {
				whole++
			}
			if reset {
				resets++
			}
		}
		return whole, resets
	}
	wholeDirect, resetsDirect := count(func(t *testing.T) (client, server *net.TCPConn, end func()) {
		client, server = testtcp.Pair(t)
		return client, server, func() {}
	})
	t.Logf("without a relay: %d answers whole, %d resets, of %d", wholeDirect, resetsDirect, runs)
	forEachKind(t, func(t *testing.T, kind string) {
		whole, resets := count(func(t *testing.T) (client, server *net.TCPConn, end func()) {
			r := newRig(t, kind, Options{})
			return r.near, r.far, func() {
				if res := r.end(t); !res.Reset || !byPeer(res.Err) {
					t.Errorf("result %+v, want a reset", res)
				}
			}
		})
		t.Logf("%d answers whole, %d resets, of %d", whole, resets, runs)
		if whole < wholeDirect {
			t.Errorf("%d answers arrived whole, without a relay %d", whole, wholeDirect)
		}
		if resets < resetsDirect {
			t.Errorf("%d resets arrived, without a relay %d", resets, resetsDirect)
		}
	})
}

// answerSize is more than the client's kernel takes while nobody reads, and less
// than that and the relay's send buffer together.
const answerSize = 256 << 10

// slowAnswer hands an answer of a size to a relay whose client reads nothing:
// some of it waits in the relay's send buffer.
func slowAnswer(t *testing.T, r *rig, in *total, size int) {
	t.Helper()
	if err := r.a.SetWriteBuffer(200 << 10); err != nil { // no more than the default limit
		t.Fatal(err)
	}
	go func() { _, _ = r.far.Write(make([]byte, size)) }()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for stop := time.Now().Add(5 * time.Second); in.n.Load() < int64(size); <-tick.C {
		if time.Now().After(stop) {
			t.Fatalf("the relay took %d bytes of %d", in.n.Load(), size)
		}
	}
	if isFlushed(r.a) {
		t.Fatal("the client's kernel took everything: nothing is shown here")
	}
}

// A reset does not throw away what the relay took and a slow client has yet to
// be sent.
func TestResetWaitsForASlowReader(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		var in total
		r := newRig(t, kind, Options{BtoA: &in})
		slowAnswer(t, r, &in, answerSize)
		Abort(r.far)
		select {
		case res := <-r.result:
			t.Errorf("the relay did not wait: %+v", res)
			return
		case <-time.After(50 * time.Millisecond):
		}
		n, err := io.Copy(io.Discard, r.near)
		if n != answerSize || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d bytes of %d, %v, want all and a reset", n, answerSize, err)
		}
		r.end(t)
	})
}

// Nor does it wait longer than its grace for a client that reads nothing, the
// relay being stuck in a write to it or not.
func TestResetWaitsNoLongerThanGrace(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		for _, stuck := range []bool{false, true} {
			var in total
			r := newRig(t, kind, Options{BtoA: &in})
			slowAnswer(t, r, &in, answerSize)
			if stuck {
				_ = r.far.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				for chunk := make([]byte, 1<<20); ; {
					if _, err := r.far.Write(chunk); err != nil {
						break
					}
				}
			}
			start := time.Now()
			Abort(r.far)
			_, _ = r.near.Write([]byte("x")) // a write of the relay's fails
			res := r.end(t)
			if d := time.Since(start); d < Grace/2 || d > 3*Grace {
				t.Errorf("stuck %v: Join returned after %v, want about %v", stuck, d, Grace)
			}
			if !res.Reset || !byPeer(res.Err) {
				t.Errorf("result %+v, want a reset", res)
			}
		}
	})
}

// telling reads like TLS that finds an alert among what came before a reset.
type telling struct {
	net.Conn
	why    error
	failed chan struct{} // closed when a write has failed
}

func (c telling) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		err = c.why
	}
	return n, err
}

func (c telling) Write([]byte) (int, error) {
	close(c.failed)
	return 0, syscall.EPIPE
}

// A failed write comes with the reason that the peer had sent, and is a reset
// though all that is read after it is an end.
func TestReadAfterAFailedWrite(t *testing.T) {
	for _, why := range []error{errors.New("bad certificate"), io.EOF} {
		near, a := testtcp.Pair(t)
		b, far := testtcp.Pair(t)
		result, failed := make(chan Result, 1), make(chan struct{})
		go func() { result <- Join(a, telling{b, why, failed}, Options{}) }()
		_, _ = near.Write([]byte("x"))
		<-failed
		select {
		case res := <-result:
			t.Fatalf("the relay did not wait: %+v", res)
		case <-time.After(50 * time.Millisecond):
			_ = far.Close()
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
		if res := <-result; !errors.Is(res.Err, syscall.EPIPE) || why != io.EOF && !errors.Is(res.Err, why) {
			t.Errorf("Err is %v, want a broken pipe and %v", res.Err, why)
		}
	}
}

// The kernel tells of a reset once, and of an end afterwards.
func TestResetThatWasToldBefore(t *testing.T) {
	forEachKind(t, func(t *testing.T, kind string) {
		near, a := testtcp.Pair(t)
		b, far := testtcp.Pair(t)
		Abort(far)
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("write: %v, want a reset", err)
		}
		res := join(t, kind, kinds[kind](a, false), kinds[kind](b, true), Options{})
		if !res.Reset {
			t.Errorf("result %+v, want a reset", res)
		}
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
	})
}

// resetsAtEnd has a peer that answers the end with a reset, as one that has
// closed answers a close_notify.
type resetsAtEnd struct {
	wrapped
	peer *net.TCPConn
}

func (c resetsAtEnd) CloseWrite() error {
	Abort(c.peer)
	<-time.After(50 * time.Millisecond) // whoever watches has seen it
	return nil
}

func TestResetAtTheVeryEndIsNone(t *testing.T) {
	near, a := testtcp.Pair(t)
	b, far := testtcp.Pair(t)
	result := make(chan Result, 1)
	go func() { result <- Join(a, resetsAtEnd{wrapped{b}, far}, Options{}) }()
	_ = far.CloseWrite()
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("read: %v, want an end", err)
	}
	_ = near.CloseWrite()
	if res := <-result; res.Reset || res.Err != nil {
		t.Errorf("result %+v, want a clean end", res)
	}
}
