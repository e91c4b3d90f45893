package alpn

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/internal/memnet"
	"culvert/internal/pipe"
	"culvert/internal/testtcp"
)

// A relay is server <-> (joined) <-> peer, with TLS on the peer's side.
type relay struct {
	server *net.TCPConn
	peer   *Conn
	raw    *net.TCPConn // beneath peer
	result chan pipe.Result
}

func newRelay(t *testing.T) *relay {
	t.Helper()
	client, accepted := testtcp.Pair(t)
	peer, far := newSite(t).connect(t, client, accepted, "rpc")
	server, near := testtcp.Pair(t)
	_ = near.SetDeadline(time.Time{})
	r := &relay{server: server, peer: peer, raw: client, result: make(chan pipe.Result, 1)}
	if far.TCP() != accepted || peer.TCP() != client {
		t.Error("TCP does not return the connection beneath")
	}
	fast := net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 5}
	if err := far.TCP().SetKeepAliveConfig(fast); err != nil {
		t.Fatal(err)
	}
	go func() { r.result <- pipe.Join(near, far, pipe.Options{}) }()
	t.Cleanup(func() { pipe.Abort(server); peer.Abort() })
	// The tickets of the handshake must not lie unread: a close would reset.
	_, _ = server.Write([]byte("x"))
	if _, err := peer.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *relay) end(t *testing.T) pipe.Result {
	t.Helper()
	select {
	case res := <-r.result:
		return res
	case <-time.After(10 * time.Second):
		t.Fatal("the relay did not end within 10 s")
		return pipe.Result{}
	}
}

func (r *relay) wantOpen(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case res := <-r.result:
		t.Fatalf("the relay has ended: %+v", res)
	case <-time.After(d):
	}
}

// What happens beneath TLS after a half-close is noticed, though the server
// neither writes nor ends.
func TestPeerDiesAfterHalfClose(t *testing.T) {
	for name, die := range map[string]func(t *testing.T, r *relay){
		"reset": func(_ *testing.T, r *relay) { r.peer.Abort() },
		// By keepalive, when the peer's kernel has forgotten the connection:
		// after a second instead of a minute.
		"close": func(t *testing.T, r *relay) {
			raw, err := r.raw.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_LINGER2, 1) })
			if err != nil {
				t.Fatal(err)
			}
			_ = r.peer.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t)
			_, _ = r.peer.Write([]byte("last words"))
			if err := r.peer.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r.server); err != nil || string(got) != "last words" {
				t.Fatalf("the server read %q, %v", got, err)
			}
			r.wantOpen(t, 50*time.Millisecond)
			die(t, r)
			if res := r.end(t); !res.Reset || !errors.Is(res.Err, syscall.ECONNRESET) {
				t.Errorf("result %+v, want a reset", res)
			}
		})
	}
}

// A peer that writes and closes the whole connection has its bytes delivered
// and ended cleanly, to a server that takes its time.
func TestPeerWritesAndCloses(t *testing.T) {
	r := newRelay(t)
	const size = 1 << 20
	if _, err := r.peer.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	_ = r.peer.Close()
	r.wantOpen(t, pipe.Grace+200*time.Millisecond)
	if n, err := io.Copy(io.Discard, r.server); err != nil || n != size {
		t.Errorf("the server read %d bytes of %d, %v", n, size, err)
	}
	r.wantOpen(t, 50*time.Millisecond)
	_ = r.server.Close()
	if res := r.end(t); res.Reset || res.Err != nil {
		t.Errorf("result %+v, want a clean end", res)
	}
}

// A half-close by TLS and TCP both leaves the other direction open.
func TestPeerHalfClosesTCPToo(t *testing.T) {
	r := newRelay(t)
	_ = r.peer.CloseWrite()
	_ = r.raw.CloseWrite()
	if got, err := io.ReadAll(r.server); err != nil || len(got) != 0 {
		t.Fatalf("the server read %q, %v", got, err)
	}
	r.wantOpen(t, 2500*time.Millisecond) // two probes
	_, _ = r.server.Write([]byte("answer"))
	_ = r.server.CloseWrite()
	if got, err := io.ReadAll(r.peer); err != nil || string(got) != "answer" {
		t.Errorf("the peer read %q, %v", got, err)
	}
	if res := r.end(t); res.Reset || res.Err != nil {
		t.Errorf("result %+v, want a clean end", res)
	}
}

func TestTCPOfAnotherKind(t *testing.T) {
	client, server := memnet.Pipe()
	if dialed, accepted := newSite(t).connect(t, client, server, "rpc"); dialed.TCP() != nil || accepted.TCP() != nil {
		t.Error("TCP found a TCP connection beneath another kind")
	}
}
