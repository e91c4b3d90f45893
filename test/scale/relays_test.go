package scale

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the same packets cost when nothing is done but to pass them on.

// instead are what a process is that is not the peers.
var instead = map[string]func(*testing.T, peerPlan){
	"relay": relay, "least": least, "ends": ends,
}

// endsAt is where least sends to.
const endsAt = "127.212.255.3:8443"

// startRelay starts a relay in a process of its own, as a subject for traffic.
func startRelay(b *testing.B, what string, count int) *subject {
	b.Helper()
	plan := peerPlan{Be: what, Warm: count, Listen: endsAt}
	if what == "least" {
		startOthers(b, peerPlan{Be: "ends", Warm: count, Listen: endsAt})
	}
	s := &subject{b: b, peerAddr: relayAddr, pid: startOthers(b, plan)}
	if what == "least" {
		s.peerAddr = leastAddr
	}
	var err error
	if s.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP("127.212.255.2")}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.udp.Close() })
	return s
}

func relayAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 212, byte(i / 250), byte(i%250 + 1)})
}

func leastAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 213, byte(i / 250), byte(i%250 + 1)})
}

// serveUntilTold tells who has started this that it is ready, and waits for the end.
func serveUntilTold() {
	fmt.Println("ready") //nolint:forbidigo // to who has started this
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// relay is what is written first: it has a socket for each peer, and sends what comes
// there on to another, by UDP, by the means of package net.
func relay(t *testing.T, plan peerPlan) {
	sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP("127.212.255.1")})
	if err != nil {
		t.Fatal(err)
	}
	to := sink.LocalAddr().(*net.UDPAddr).AddrPort() //nolint:forcetypeassert // of UDP
	var wg sync.WaitGroup
	var sockets []*net.UDPConn
	for i := range plan.Warm {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(relayAddr(i), gossipPort)))
		if err != nil {
			t.Fatal(err)
		}
		sockets = append(sockets, c)
		wg.Go(func() {
			buf := make([]byte, 2048)
			for {
				n, _, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort(buf[:n], to) // lost like any packet
			}
		})
	}
	serveUntilTold()
	_ = sink.Close()
	for _, c := range sockets {
		_ = c.Close()
	}
	wg.Wait()
}

// least is the least that can be there instead of a sidecar: a socket for each peer,
// and what comes there goes on by the peer's TCP connection, as long as a frame in a
// record is. One goroutine waits for all by epoll(7), and of its calls to the kernel
// the runtime does not know. What it costs is the kernel's, but for waking one goroutine.
func least(t *testing.T, plan peerPlan) {
	const added = 4 + 22 // a frame's header, and what TLS 1.3 adds to a record
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(epoll, true); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(epoll), "epoll")
	to := make(map[int32]uintptr)
	for i := range plan.Warm {
		in, out := openPair(t, i)
		to[int32(in)] = uintptr(out)
		event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(in)}
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, in, &event); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		var events [64]unix.EpollEvent
		var buf [2048]byte
		_ = raw.Read(func(fd uintptr) bool {
			n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, fd, uintptr(unsafe.Pointer(&events)), uintptr(len(events)), 0, 0, 0)
			if errno != 0 {
				n = 0
			}
			for _, e := range events[:n] {
				for {
					n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(e.Fd), uintptr(unsafe.Pointer(&buf)), uintptr(len(buf)))
					if errno != 0 {
						break
					}
					_, _, _ = unix.RawSyscall(unix.SYS_WRITE, to[e.Fd], uintptr(unsafe.Pointer(&buf)), n+added)
				}
			}
			return false
		})
	})
	serveUntilTold()
	_ = file.Close()
	wg.Wait() // the sockets end with the process
}

// openPair opens a peer's socket, and its connection to the ends.
func openPair(t *testing.T, peer int) (in, out int) {
	t.Helper()
	end := netip.MustParseAddrPort(endsAt)
	in, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Bind(in, &unix.SockaddrInet4{Port: gossipPort, Addr: leastAddr(peer).As4()})
	}
	if err == nil {
		out, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	}
	if err == nil {
		err = unix.Connect(out, &unix.SockaddrInet4{Port: int(end.Port()), Addr: end.Addr().As4()})
	}
	if err == nil {
		err = unix.SetsockoptInt(out, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err == nil {
		err = unix.SetNonblock(out, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	return in, out
}

// ends are the other ends of the connections of least: they are read, each by a
// goroutine.
func ends(t *testing.T, plan peerPlan) {
	ln, err := net.Listen("tcp4", plan.Listen)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			})
		}
	})
	serveUntilTold()
	_ = ln.Close()
	wg.Wait()
}
