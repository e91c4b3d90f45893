package alpn

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"culvert/internal/memnet"
)

// tally is a connection whose writes are counted.
type tally struct {
	net.Conn

	mu     sync.Mutex
	writes int
}

func (y *tally) Write(p []byte) (int, error) {
	y.mu.Lock()
	y.writes++
	y.mu.Unlock()
	return y.Conn.Write(p)
}

func (y *tally) count() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.writes
}

// What is written at once goes out at once, as far as a cork holds it, and what is
// answered meanwhile comes at the end of a record and not within one.
func TestRecordsGoOutTogether(t *testing.T) {
	s := newSite(t)
	near, far := memnet.Pipe()
	out := &tally{Conn: near}
	client, server := s.connect(t, out, far, "rpc")
	for _, c := range []struct{ bytes, writes int }{
		{1, 1}, {maxPlaintext, 1}, {maxPlaintext + 1, 1}, {4 * maxPlaintext, 1}, {5 * maxPlaintext, 2}, {16 * maxPlaintext, 4},
	} {
		sent := make([]byte, c.bytes)
		for i := range sent {
			sent[i] = byte(i ^ i>>8)
		}
		before := out.count()
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			if n, err := client.Write(sent); n != len(sent) || err != nil {
				t.Errorf("%d of %d bytes are written: %v", n, len(sent), err)
			}
		}()
		got := make([]byte, c.bytes)
		if _, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes do not arrive: %v", c.bytes, err)
		}
		<-wrote
		if n := out.count() - before; n != c.writes {
			t.Errorf("%d bytes take %d writes, want %d", c.bytes, n, c.writes)
		}
	}
	if client.wire.cork.buf != nil {
		t.Error("a buffer is held with nothing in it")
	}
}

// A write that has failed in the midst of a record leaves nothing to be written
// behind it.
func TestCorkAfterFailure(t *testing.T) {
	s := newSite(t)
	near, far := memnet.Pipe()
	out := &tally{Conn: near}
	client, _ := s.connect(t, out, far, "rpc")
	near.Block()
	_ = client.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := client.Write(make([]byte, 2*maxPlaintext)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a write to who does not read: %v", err)
	}
	near.Unblock()
	_ = client.SetWriteDeadline(time.Time{})
	before := out.count()
	for _, n := range []int{1, 2 * maxPlaintext} {
		if _, err := client.Write(make([]byte, n)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%d bytes behind it: %v", n, err)
		}
	}
	if n := out.count() - before; n != 0 {
		t.Errorf("%d writes behind one that failed", n)
	}
	if client.wire.cork.buf != nil {
		t.Error("a buffer is held")
	}
}

// ReadMore reads the records that have come, and waits neither for the rest of one nor
// behind one that has nothing for the reader, as a session ticket.
func TestReadMore(t *testing.T) {
	s := newSite(t)
	client, server := s.connectTCP(t, "rpc")
	buf := make([]byte, 4*maxPlaintext)
	client.AwaitRead() // the ticket
	if n, err := client.ReadMore(buf); n != 0 || err != nil {
		t.Fatalf("a ticket alone reads as %d bytes, %v", n, err)
	}
	for _, k := range []int{100, 50, 25} {
		if _, err := server.Write(make([]byte, k)); err != nil {
			t.Fatal(err)
		}
	}
	for got := 0; got < 175; {
		client.AwaitRead()
		n, err := client.Read(buf[:30])
		if err != nil {
			t.Fatal(err)
		}
		for k := n; k > 0; n += k {
			if k, err = client.ReadMore(buf[n:]); err != nil {
				t.Fatal(err)
			}
		}
		got += n
	}
	if n, err := client.ReadMore(buf); n != 0 || err != nil {
		t.Errorf("nothing reads as %d bytes, %v", n, err)
	}
	_ = server.CloseWrite()
	client.AwaitRead()
	if n, err := client.ReadMore(buf); n != 0 || err != io.EOF {
		t.Errorf("the end reads as %d bytes, %v", n, err)
	}
}

// A record of which a part has come stays whole for the next Read.
func TestReadMoreOfAPart(t *testing.T) {
	s := newSite(t)
	near, far := memnet.Pipe()
	held := &holding{Conn: near}
	client, server := s.connect(t, held, far, "rpc")
	held.hold()
	if _, err := client.Write([]byte("first")); err != nil {
		t.Fatal(err)
	}
	first := len(held.held())
	if _, err := client.Write([]byte("second")); err != nil {
		t.Fatal(err)
	}
	sent := held.held()
	for part := 1; part <= len(sent)-first; part += 4 {
		if part > 1 {
			held.hold()
			_, _ = client.Write([]byte("first"))
			_, _ = client.Write([]byte("second"))
			sent = held.held()
		}
		_, _ = near.Write(sent[:first+part])
		buf := make([]byte, 100)
		n, err := server.Read(buf)
		if string(buf[:n]) != "first" || err != nil {
			t.Fatalf("%q, %v", buf[:n], err)
		}
		if n, err := server.ReadMore(buf); n != 0 || err != nil {
			t.Fatalf("%d bytes of a record read as %q, %v", part, buf[:n], err)
		}
		_, _ = near.Write(sent[first+part:])
		if n, err := server.Read(buf); string(buf[:n]) != "second" || err != nil {
			t.Fatalf("cut after %d bytes: %q, %v", part, buf[:n], err)
		}
	}
}

// holding is a connection that keeps what is written, once it was told to.
type holding struct {
	net.Conn

	mu   sync.Mutex
	on   bool
	kept []byte
}

func (h *holding) hold() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.on, h.kept = true, nil
}

func (h *holding) held() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return bytes.Clone(h.kept)
}

func (h *holding) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.on {
		return h.Conn.Write(p)
	}
	h.kept = append(h.kept, p...)
	return len(p), nil
}
