package alpn

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"culvert/internal/testtcp"
)

// If this fails with a new Go, crypto/tls has changed what [intake] relies on:
// packet connections work as before, and cost a buffer each and an object a packet.
func TestIntakeKnowsCryptoTLS(t *testing.T) {
	s := newSite(t)
	c, a := s.connectTCP(t, "gossip-packet")
	if c.intake == nil || a.intake == nil {
		t.Fatal("tls.Conn has no rawInput and input of the types that are expected")
	}
	if c, _ := s.connectTCP(t, "rpc"); c.intake != nil {
		t.Error("a stream has one")
	}
}

// However records are cut and put together on their way, what is read is what was
// written, and nothing is held when all has been read.
func TestIntake(t *testing.T) {
	for name, chunk := range map[string]func() int{
		"byte by byte": func() int { return 1 },
		"anyhow":       func() int { return 1 + rand.IntN(3000) },
		"much at once": func() int { return 1 << 20 },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			client, near := testtcp.Pair(t)
			far, server := testtcp.Pair(t)
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = io.Copy(near, far) }) // until the test closes them
			wg.Go(func() { pass(far, near, chunk) })
			c, a := s.connect(t, client, server, "gossip-packet")

			var sent, got []byte
			records := 200
			if name == "byte by byte" {
				records = 20
			}
			read := make(chan struct{})
			wg.Go(func() {
				defer close(read)
				got, _ = io.ReadAll(a) // what it read is compared
			})
			for i := range records {
				p := bytes.Repeat([]byte{byte(i)}, 1+rand.IntN(1+rand.IntN(16384)))
				if _, err := c.Write(p); err != nil {
					t.Fatal(err)
				}
				if err := c.Flush(); err != nil {
					t.Fatal(err)
				}
				sent = append(sent, p...)
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			<-read
			_ = near.Close()
			_ = far.Close()
			wg.Wait()
			if !bytes.Equal(got, sent) {
				t.Fatalf("%d bytes came of %d, or others", len(got), len(sent))
			}
		})
	}
}

// pass hands on what comes, a chunk at a time, until the end.
func pass(to, from *net.TCPConn, chunk func() int) {
	buf := make([]byte, 1<<20)
	for {
		n, err := from.Read(buf)
		for p := buf[:n]; len(p) > 0; {
			k := min(chunk(), len(p))
			_, _ = to.Write(p[:k])
			p = p[k:]
		}
		if err != nil {
			_ = to.CloseWrite()
			return
		}
	}
}

func TestIntakeHoldsNothingWhileItWaits(t *testing.T) {
	s := newSite(t)
	c, a := s.connectTCP(t, "gossip-packet")
	in := a.intake
	buf := make([]byte, 100)
	for _, size := range []int{1, 100, 16384} {
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		for left := size; left > 0; {
			n, err := a.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			left -= n
			if held := in.buf != nil; held != (left > 0) {
				t.Fatalf("%d of %d bytes left, a buffer is held: %v", left, size, held)
			}
		}
	}
	// Nor after a wait that came to nothing; and the connection is still good.
	_ = a.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := a.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	_ = a.SetReadDeadline(time.Time{})
	if in.buf != nil || in.raw.Cap() != 0 {
		t.Error("a buffer is held by nothing")
	}
	if _, err := c.Write([]byte("on")); err != nil {
		t.Fatal(err)
	}
	if n, err := a.Read(buf); string(buf[:n]) != "on" || err != nil {
		t.Fatalf("%q, %v", buf[:n], err)
	}
}

// The ends are told apart as without an intake, more than once.
func TestIntakeEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(c *Conn)
		want error
	}{
		"close_notify": {func(c *Conn) { _ = c.CloseWrite() }, io.EOF},
		"cut off":      {func(c *Conn) { _ = c.TCP().CloseWrite() }, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			c, a := s.connectTCP(t, "gossip-packet")
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			tc.end(c)
			buf := make([]byte, 10)
			if n, err := io.ReadFull(a, buf[:1]); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			for range 2 {
				if n, err := a.Read(buf); n != 0 || err != tc.want {
					t.Fatalf("%d bytes, %v; want %v", n, err, tc.want)
				}
			}
		})
	}
}
