package alpn

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"culvert/internal/memnet"
	"culvert/internal/testtcp"
)

func TestConn(t *testing.T) {
	s := newSite(t)
	c, a := s.connectTCP(t, "gossip-packet")
	if c.Peer().String() != "dc1/alice" || a.Peer().String() != "dc2/bob" {
		t.Errorf("peers are %v and %v", c.Peer(), a.Peer())
	}
	want := Route{Protocol: "culvert/packet/1/gossip-packet", Service: "gossip-packet", Kind: KindPacket}
	if c.Route() != want || a.Route() != want {
		t.Errorf("routes are %+v and %+v, want %+v", c.Route(), a.Route(), want)
	}
	if !c.Coalesce() || c.Version() != "TLS 1.3" {
		t.Errorf("Coalesce %v, Version %q", c.Coalesce(), c.Version())
	}
	// Half-close both ways, with data after the first.
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(a); string(got) != "ping" || err != nil {
		t.Fatalf("acceptor read %q, %v", got, err)
	}
	if _, err := a.Write([]byte("pong")); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "pong" || err != nil {
		t.Fatalf("dialler read %q, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	in, out := count(s.accept.metrics.wireIn), count(s.accept.metrics.wireOut)
	if in == 0 || out == 0 || in != count(s.dialed.wireOut) || out != count(s.dialed.wireIn) {
		t.Errorf("acceptor counted %d in, %d out; dialler %d out, %d in", in, out, count(s.dialed.wireOut), count(s.dialed.wireIn))
	}
	if count(s.accept.metrics.acceptOK) != 1 || count(s.dialed.dialOK) != 1 {
		t.Error("a handshake was not counted once")
	}
	s.accept.wantRefused(t)
}

// A cut passes on what its end writes, until it is told to keep it instead.
type cut struct {
	net.Conn
	mu   sync.Mutex
	keep bool
	kept []byte
}

func (c *cut) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keep {
		c.kept = append(c.kept, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *cut) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep = true
}

// Every end that lacks the last byte of close_notify is a broken connection,
// and only the whole of it is an end that was meant; in one piece or byte by
// byte, with or without data before it in the same segment.
func TestEveryTruncationIsUnexpected(t *testing.T) {
	s := newSite(t)
	for _, data := range []string{"", "data"} {
		whole := -1
		for k := 0; whole < 0 || k <= whole; k++ {
			for _, size := range []int{1, 1 << 10} {
				client, server := testtcp.Pair(t)
				tail := &cut{Conn: client}
				dialed, accepted := s.connect(t, tail, server, "rpc")
				// The tickets that the acceptor sent must not decide anything.
				tail.start()
				if data != "" {
					if _, err := dialed.Write([]byte(data)); err != nil {
						t.Fatal(err)
					}
				}
				if err := dialed.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				whole = len(tail.kept)
				_ = client.SetWriteDeadline(time.Time{}) // crypto/tls lets nothing more be written
				for rest := tail.kept[:k]; len(rest) > 0; rest = rest[min(size, len(rest)):] {
					if _, err := client.Write(rest[:min(size, len(rest))]); err != nil {
						t.Fatal(err)
					}
				}
				if err := client.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(accepted)
				want := io.ErrUnexpectedEOF
				if k == whole {
					want = nil
				}
				if !errors.Is(err, want) {
					t.Errorf("%d of %d bytes, %d at a time: error %v, want %v", k, whole, size, err, want)
				}
				if len(got) > 0 && string(got) != data {
					t.Errorf("%d of %d bytes: read %q", k, whole, got)
				}
				if _, err := accepted.Read(make([]byte, 1)); (err == io.EOF) != (k == whole) {
					t.Errorf("%d of %d bytes: second Read error %v", k, whole, err)
				}
				dialed.Abort()
				accepted.Abort()
			}
		}
	}
}

// endsWithData returns the end of the stream together with its last bytes, as
// io.Reader allows and some connections do.
type endsWithData struct {
	net.Conn
}

func (c *endsWithData) Read(p []byte) (int, error) {
	n, err := io.ReadAtLeast(c.Conn, p, len(p))
	if err != nil {
		err = io.EOF
	}
	return n, err
}

func TestEndTogetherWithData(t *testing.T) {
	for _, graceful := range []bool{true, false} {
		s := newSite(t)
		client, server := testtcp.Pair(t)
		tail := &cut{Conn: client}
		dialed, accepted := s.connect(t, tail, server, "rpc")
		tail.start()
		_, _ = dialed.Write([]byte("data"))
		if graceful {
			_ = dialed.CloseWrite()
		}
		_ = client.SetWriteDeadline(time.Time{}) // crypto/tls lets nothing more be written
		_, _ = client.Write(tail.kept)
		_ = client.CloseWrite()
		accepted.wire.raw = &endsWithData{Conn: accepted.wire.raw}
		got, err := io.ReadAll(accepted)
		if string(got) != "data" || (err == nil) != graceful {
			t.Errorf("graceful %v: read %q, %v", graceful, got, err)
		}
	}
}

func TestResetIsAReset(t *testing.T) {
	s := newSite(t)
	dialed, accepted := s.connectTCP(t, "rpc")
	dialed.Abort()
	if _, err := accepted.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after the peer's Abort: %v, want a reset", err)
	}
}

// One write of up to 16 KiB is one record from the very first on: receivers of
// native frames depend on it.
func TestOneWriteOneRecord(t *testing.T) {
	s := newSite(t)
	client, server := testtcp.Pair(t)
	tail := &cut{Conn: client}
	dialed, accepted := s.connect(t, tail, server, "gossip-packet")
	tail.start()
	for _, size := range []int{1, 1400, 16 << 10} {
		tail.kept = nil
		if _, err := dialed.Write(bytes.Repeat([]byte("x"), size)); err != nil {
			t.Fatal(err)
		}
		wantRecord(t, tail.kept, size)
	}
	// The accepting side's configuration comes another way.
	if _, err := accepted.Write(bytes.Repeat([]byte("y"), 16<<10)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 20<<10)
	if n, err := io.ReadAtLeast(dialed, buf, 1); n != 16<<10 || err != nil {
		t.Errorf("first Read of what was one Write: %d bytes, %v", n, err)
	}
}

func wantRecord(t *testing.T, b []byte, size int) {
	t.Helper()
	const overhead = 1 + 16 // inner type and tag
	if len(b) < 5 || b[0] != 23 || int(b[3])<<8|int(b[4]) != size+overhead || len(b) != 5+size+overhead {
		t.Errorf("a write of %d bytes became % x... (%d bytes), want one record", size, b[:min(5, len(b))], len(b))
	}
}

// bubble runs f with a connection over memnet inside a synctest bubble; pause
// holds up what the dialling side writes.
func bubble(t *testing.T, f func(dialed, accepted *Conn, raw *memnet.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		client, server := memnet.Pipe()
		dialed, accepted := s.connect(t, client, server, "rpc")
		f(dialed, accepted, client)
		dialed.Abort()
		accepted.Abort()
	})
}

func TestCloseIsBounded(t *testing.T) {
	bubble(t, func(dialed, _ *Conn, raw *memnet.Conn) {
		raw.Block()
		start := time.Now()
		_ = dialed.Close()
		if d := time.Since(start); d > closeTimeout {
			t.Errorf("Close of a stuck connection took %v", d)
		}
	})
}

func TestCloseWriteIsPatient(t *testing.T) {
	bubble(t, func(dialed, accepted *Conn, raw *memnet.Conn) {
		raw.Block()
		done := make(chan error)
		go func() { done <- dialed.CloseWrite() }()
		time.Sleep(time.Minute)
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("CloseWrite gave up: %v", err)
		default:
		}
		raw.Unblock()
		if err := <-done; err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
		if _, err := accepted.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("Read after CloseWrite: %v", err)
		}
	})
}

// Not in a bubble: Close waits for a lock that crypto/tls holds, and a bubble's
// clock stands still meanwhile.
func TestCloseInterruptsCloseWrite(t *testing.T) {
	client, server := memnet.Pipe()
	dialed, accepted := newSite(t).connect(t, client, server, "rpc")
	defer accepted.Abort()
	client.Block()
	done := make(chan error)
	go func() { done <- dialed.CloseWrite() }()
	select {
	case err := <-done:
		t.Fatalf("CloseWrite gave up at once: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	closed := make(chan error, 1)
	go func() { closed <- dialed.Close() }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("CloseWrite reports success though nothing was sent")
		}
	case <-time.After(10 * closeTimeout):
		t.Fatal("CloseWrite goes on after Close")
	}
	<-closed
}
