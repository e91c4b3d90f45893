package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/test/lab"
)

// Requests are eight bytes: how many bytes to answer with. After sinkRequest
// the server takes what comes, and after framesRequest packets in frames.
const (
	sinkRequest   = 1<<64 - 1
	framesRequest = 1<<64 - 2
	longest       = 30 * time.Second // any exchange
)

// A responder is the server behind each address: on TCP and on UDP.
type responder struct {
	tb      testing.TB
	udp     *net.UDPConn
	sunk    atomic.Int64 // bytes taken
	packets meter
	echoes  chan struct{} // packets of one byte
	wg      sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool // nil: closed
}

// respond serves on a server's host until the test ends.
func respond(tb testing.TB, s *server) *responder {
	tb.Helper()
	r := &responder{tb: tb, conns: make(map[net.Conn]bool), echoes: make(chan struct{}, 100)}
	var listeners []net.Listener
	for _, port := range []int{gossipPort, bulkPort} {
		ln, err := s.host.Listen(lab.HostPort(s.host.Addr, port))
		if err != nil {
			tb.Fatal(err)
		}
		listeners = append(listeners, ln)
		r.wg.Go(func() { r.accept(ln) })
	}
	var err error
	if r.udp, err = s.host.ListenPacket(lab.HostPort(s.host.Addr, gossipPort)); err != nil {
		tb.Fatal(err)
	}
	r.wg.Go(r.receive)
	tb.Cleanup(func() {
		for _, ln := range listeners {
			_ = ln.Close()
		}
		_ = r.udp.Close()
		r.mu.Lock()
		for c := range r.conns {
			_ = c.Close()
		}
		r.conns = nil
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

func (r *responder) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		open := r.conns != nil
		if open {
			r.conns[c] = true
		}
		r.mu.Unlock()
		if !open {
			_ = c.Close()
			return
		}
		r.wg.Go(func() {
			r.serve(c)
			_ = c.Close()
			r.mu.Lock()
			delete(r.conns, c)
			r.mu.Unlock()
		})
	}
}

// serve answers one request. Errors are the client's to notice.
func (r *responder) serve(c net.Conn) {
	buf := make([]byte, 256<<10)
	if _, err := io.ReadFull(c, buf[:8]); err != nil {
		return
	}
	switch n := binary.BigEndian.Uint64(buf); n {
	case sinkRequest:
		for {
			n, err := c.Read(buf)
			r.sunk.Add(int64(n))
			if err != nil {
				return
			}
		}
	case framesRequest:
		for {
			if _, err := io.ReadFull(c, buf[:4]); err != nil {
				return
			}
			frame := buf[4 : 4+min(binary.BigEndian.Uint32(buf), 65507)]
			if _, err := io.ReadFull(c, frame); err != nil {
				return
			}
			r.packets.note(frame)
		}
	default:
		for n > 0 {
			k, err := c.Write(buf[:min(n, uint64(len(buf)))])
			if err != nil {
				return
			}
			n -= uint64(k)
		}
	}
}

// receive notes packets, and sends those of one byte back.
func (r *responder) receive() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := r.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		switch {
		case err != nil: // what was sent before was refused
		case n == 1 && buf[0] == 'q':
			_, _ = r.udp.WriteToUDPAddrPort([]byte{'a'}, from)
		case n == 1:
			select {
			case r.echoes <- struct{}{}:
			default:
			}
		default:
			r.packets.note(buf[:n])
		}
	}
}

// request opens a connection and sends a request.
func request(h *lab.Host, address string, n uint64) (net.Conn, error) {
	c, err := h.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(longest))
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// fetch asks for n bytes on a new connection, and returns how long that took
// from before the connection was made.
func fetch(h *lab.Host, address string, n uint64) (time.Duration, error) {
	began := time.Now()
	c, err := request(h, address, n)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	buf := make([]byte, 256<<10)
	for left := n; left > 0; {
		k, err := c.Read(buf)
		left -= min(uint64(k), left)
		if err != nil && left > 0 {
			return 0, fmt.Errorf("%d of %d bytes are missing: %w", left, n, err)
		}
	}
	return time.Since(began), nil
}

// warm has a packet go to a server and back, through the sidecars.
func warm(tb testing.TB, from *responder, to *server) {
	tb.Helper()
	target := net.UDPAddrFromAddrPort(netipPort(to.virtual, gossipPort))
	lab.Eventually(tb, 20*time.Second, func() error {
		if _, err := from.udp.WriteToUDP([]byte{'q'}, target); err != nil {
			return err
		}
		select {
		case <-from.echoes:
			return nil
		case <-time.After(time.Second):
			return errors.New("no packet has come back")
		}
	})
}
