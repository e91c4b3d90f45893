package alpn

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"culvert/internal/memnet"
	"culvert/internal/testtcp"
)

// A wire gives out no byte of a record before the one before it was asked for whole,
// however they arrive.
func TestWireKeepsRecordsApart(t *testing.T) {
	record := func(n int) []byte { return append([]byte{23, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...) }
	var sent []byte
	sizes := []int{1, 0, 700, 16 << 10, 3}
	for _, n := range sizes {
		sent = append(sent, record(n)...)
	}
	for _, tcp := range []bool{false, true} {
		for _, ask := range []int{1, 3, 5, 1000, 64 << 10} {
			near, raw := wirePair(t, tcp)
			w := newWire(raw, sent[:7], NewMetrics(prometheus.NewRegistry())) // some of it was peeked
			go func() {
				_, _ = near.Write(sent[7:])
				_ = near.Close()
			}()
			left, at := recordHeader+sizes[0], 0
			for {
				n, err := w.Read(make([]byte, ask))
				if err == io.EOF && n == 0 {
					break
				}
				if err != nil || n == 0 || n > left {
					t.Fatalf("tcp %v, %d at a time: %d bytes of %d, %v", tcp, ask, n, left, err)
				}
				if left -= n; left == 0 {
					if at++; at < len(sizes) {
						left = recordHeader + sizes[at]
					}
				}
			}
			if at != len(sizes) || left != 0 || !w.ended.Load() {
				t.Errorf("tcp %v, %d at a time: %d records and %d bytes left", tcp, ask, at, left)
			}
			if w.buf != nil || w.chunk != nil {
				t.Error("a buffer is held after the end")
			}
			_ = raw.Close()
		}
	}
}

func wirePair(t *testing.T, tcp bool) (near, far net.Conn) {
	t.Helper()
	if tcp {
		return testtcp.Pair(t)
	}
	a, b := memnet.Pipe()
	return a, b
}

// AwaitRead neither waits for what has come nor holds a buffer while it waits.
func TestAwaitRead(t *testing.T) {
	s := newSite(t)
	client, server := s.connectTCP(t, "rpc")
	defer client.Abort()
	defer server.Abort()
	// Two records in one segment, read in parts.
	go func() { _, _ = client.Write(make([]byte, 100)); _, _ = client.Write(make([]byte, 50)) }()
	for got := 0; got < 150; {
		server.AwaitRead()
		n, err := server.Read(make([]byte, 30))
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	waiting := make(chan struct{})
	go func() {
		defer close(waiting)
		server.AwaitRead()
	}()
	select {
	case <-waiting:
		t.Fatal("it did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	_, _ = client.Write([]byte("x"))
	<-waiting
	if n, err := server.Read(make([]byte, 30)); n != 1 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
	if server.wire.buf != nil {
		t.Error("a buffer is held with nothing in it")
	}
	// An end is an end, and stays one.
	_ = client.CloseWrite()
	server.AwaitRead()
	if _, err := server.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read at the end: %v", err)
	}
}

// Peers that stop within their handshake take no turn from others.
func TestSlowHandshakesTakeNoTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		for range 3 * cap(s.accept.turns) {
			near, far := memnet.Pipe()
			defer near.Close()
			s.accept.serve(t, far)
			go func() { // a hello, and no more
				_ = tls.Client(&mute{near}, s.dialer.creds.ClientConfig(aliceName, s.table.Offer("rpc"))).Handshake()
			}()
		}
		synctest.Wait()
		if n := len(s.accept.turns); n > 0 {
			t.Errorf("%d turns are taken", n)
		}
		near, far := memnet.Pipe()
		s.accept.serve(t, far)
		c, err := s.dialer.Dial(t.Context(), near, aliceName, "rpc")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Abort()
		served := <-s.accept.conns
		served.Abort()
	})
}

// mute hears nothing.
type mute struct{ net.Conn }

func (m *mute) Read([]byte) (int, error) {
	_, err := io.Copy(io.Discard, m.Conn)
	return 0, err
}
