package alpn

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"
)

// fill writes to a packet connection until its socket takes no more, and returns
// what it wrote.
func fill(t *testing.T, c *Conn) []byte {
	t.Helper()
	var sent []byte
	for i := 0; !c.Pending(); i++ {
		record := bytes.Repeat([]byte{byte(i)}, 16<<10)
		began := time.Now()
		if _, err := c.Write(record); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Fatalf("a write took %v", took)
		}
		sent = append(sent, record...)
		if len(sent) > 1<<28 {
			t.Fatal("a socket without end")
		}
	}
	return sent
}

// What the network does not take is kept, and goes out in order.
func TestPacketWritesDoNotWait(t *testing.T) {
	s := newSite(t)
	c, a := s.connectTCP(t, "gossip-packet")
	sent := fill(t, c)
	for range 3 { // as crypto/tls may by itself
		if _, err := c.Write([]byte("behind")); err != nil {
			t.Fatal(err)
		}
		sent = append(sent, "behind"...)
	}
	var got []byte
	var wg sync.WaitGroup
	wg.Go(func() { got, _ = io.ReadAll(a) }) // what it read is compared
	if err := c.Flush(); err != nil || c.Pending() {
		t.Fatalf("flush: %v, pending %v", err, c.Pending())
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if !bytes.Equal(got, sent) {
		t.Fatalf("%d bytes came of %d, or others", len(got), len(sent))
	}
}

func TestPacketFlushEnds(t *testing.T) {
	t.Run("at its deadline", func(t *testing.T) {
		s := newSite(t)
		c, _ := s.connectTCP(t, "gossip-packet")
		fill(t, c)
		_ = c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		if err := c.Flush(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("flush: %v", err)
		}
	})
	t.Run("when the connection is cut", func(t *testing.T) {
		s := newSite(t)
		c, _ := s.connectTCP(t, "gossip-packet")
		fill(t, c)
		time.AfterFunc(10*time.Millisecond, c.Abort)
		if err := c.Flush(); err == nil {
			t.Fatal("no error")
		}
		if _, err := c.Write([]byte("x")); err == nil {
			t.Fatal("no error of a write after that")
		}
	})
	t.Run("when nobody reads", func(t *testing.T) {
		s := newSite(t)
		c, _ := s.connectTCP(t, "gossip-packet")
		fill(t, c)
		var err error
		for n := 0; err == nil; n += 16 << 10 {
			if n > maxPending {
				t.Fatalf("%d bytes are kept", n)
			}
			_, err = c.Write(make([]byte, 16<<10))
		}
		if !errors.Is(err, errPending) {
			t.Fatal(err)
		}
	})
}

// A stream's writes wait, as ever.
func TestStreamWritesWait(t *testing.T) {
	s := newSite(t)
	c, _ := s.connectTCP(t, "rpc")
	_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	var err error
	for err == nil {
		_, err = c.Write(make([]byte, 16<<10))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || c.Pending() {
		t.Fatalf("write: %v, pending %v", err, c.Pending())
	}
}
