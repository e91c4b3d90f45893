package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/catalog"
)

// A tally counts packets, and notes those that do not come in their peer's order.
type tally struct {
	recorder
	mu     sync.Mutex
	last   map[catalog.Key]byte
	order  int      // how many came out of it
	busy   sync.Map // catalog.Key: somebody is in Packet
	atOnce int      // how many came while another one of the peer's was being taken
	came   atomic.Int64
}

func (c *tally) Packet(to catalog.Key, _ string, payload []byte, _ bool) {
	if _, twice := c.busy.LoadOrStore(to, true); twice {
		c.mu.Lock()
		c.atOnce++
		c.mu.Unlock()
	}
	c.mu.Lock()
	if payload[0] != c.last[to]+1 {
		c.order++
	}
	c.last[to] = payload[0]
	c.mu.Unlock()
	c.busy.Delete(to)
	c.came.Add(1)
}

// Many endpoints that have something at once are served by several goroutines, and
// each of them by one at a time: all packets come, in the order of each peer.
func TestManyEndpointsAtOnce(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4)) // helpers there are, on any host
	const endpoints, each = 100, 3*batchSize + 5
	h := newHost(t, false)
	all := manyPeers(endpoints, netip.MustParseAddr("127.91.3.1"))
	count := &tally{last: make(map[catalog.Key]byte)}
	b, err := NewBind(all, BindOptions{Self: self, Server: serverAddr, Advertise: selfAddr, Services: h.services[:1], Handler: count})
	if err != nil {
		t.Fatal(err)
	}
	for i := range each { // what has come before it runs is taken then
		for _, p := range all {
			h.serverSends(t, p.Advertise, string(rune(i+1)))
		}
	}
	run(t, b)
	eventually(t, "all packets come", func() bool { return count.came.Load() == endpoints*each })
	count.mu.Lock()
	defer count.mu.Unlock()
	if count.order != 0 || count.atOnce != 0 {
		t.Errorf("%d packets came out of order, %d beside another of their peer's", count.order, count.atOnce)
	}
}

// Endpoints come and go while others are served.
func TestEndpointsComeAndGo(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				peers := []catalog.Peer{peer(bob, bobAddr)}
				if i%2 == 0 {
					peers = append(peers, peer(carol, carolAddr))
				}
				if err := h.bind.Set(peers); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	for i := range 500 {
		want := fmt.Sprint(i)
		_, _ = h.udp.WriteToUDPAddrPort([]byte("perhaps"), netip.AddrPortFrom(carolAddr, h.port)) // nobody may be there
		h.serverSends(t, bobAddr, want)
		for {
			if got := h.next(t); got.to == bob {
				if got.payload != want {
					t.Fatalf("bob's packet is %q, want %q", got.payload, want)
				}
				break
			} else if got.payload != "perhaps" {
				t.Fatalf("carol's packet is %q", got.payload)
			}
		}
	}
	close(stop)
	wg.Wait()
}

// An error of a socket is no end of what is read from it.
func TestEndpointAfterAnError(t *testing.T) {
	var calls atomic.Int64
	served := make(chan int64, 1)
	l, err := newLoop(func(e *endpoint, b *batch) (int, error) {
		if calls.Add(1) == 1 {
			return 0, errors.New("once")
		}
		n, err := e.udp.receive(b)
		if n > 0 {
			served <- calls.Load()
		}
		return n, err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(l.run)
	defer wg.Wait()
	defer l.close()
	h := newHost(t, false)
	e, err := openEndpoint(endpointKey{netip.AddrPortFrom(bobAddr, h.port), true}, h.services[0], bob, l)
	if err != nil {
		t.Fatal(err)
	}
	defer e.close(l)
	l.start(e)
	h.serverSends(t, bobAddr, "x")
	select {
	case n := <-served:
		if n != 2 {
			t.Errorf("it was served the %d. time", n)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the datagram was not read after the error")
	}
}

// A packet of the server's to itself costs no object either.
func TestHairpinAllocatesNothing(t *testing.T) {
	h := newHost(t, true, peer(bob, bobAddr))
	payload, buf, to := []byte("x"), make([]byte, 16), netip.AddrPortFrom(selfAddr, h.port)
	_ = h.udp.SetReadDeadline(time.Now().Add(10 * time.Second))
	allocs := testing.AllocsPerRun(100, func() {
		_, _ = h.udp.WriteToUDPAddrPort(payload, to)
		if _, _, err := h.udp.ReadFromUDPAddrPort(buf); err != nil {
			t.Error(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a packet", allocs)
	}
}

// Packets go both ways over IPv6 too.
func TestEndpointsOfIPv6(t *testing.T) {
	loopback := netip.IPv6Loopback()
	server, err := net.ListenUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	local := server.LocalAddr().(*net.UDPAddr).AddrPort()
	spare, err := net.ListenUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	port := spare.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	_ = spare.Close()
	got := &recorder{packets: make(chan captured, 1)}
	b, err := NewBind([]catalog.Peer{peer(bob, loopback)}, BindOptions{
		Self: self, Server: loopback, Advertise: netip.MustParseAddr("fd00::1"), Handler: got,
		Services: []Service{{Name: "p", Packet: true, Port: port, Local: local}},
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, b)
	bobs := netip.AddrPortFrom(loopback, port)
	if _, err := server.WriteToUDPAddrPort([]byte("out"), bobs); err != nil {
		t.Fatal(err)
	}
	select {
	case p := <-got.packets:
		if p != (captured{bob, "p", "out"}) {
			t.Errorf("got %v", p)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the packet to bob did not come")
	}
	if n, err := b.Deliver(bob, "p", [][]byte{[]byte("in")}); n != 1 || err != nil {
		t.Fatalf("deliver: %d, %v", n, err)
	}
	buf := make([]byte, 16)
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, from, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != "in" || from != bobs {
		t.Errorf("the server got %q from %v, %v", buf[:n], from, err)
	}
}

// It stops while there is something to serve: packets keep coming for an endpoint
// while it is closed.
func TestStopsWhileItServes(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = h.udp.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(carolAddr, h.port))
			}
		}
	})
	defer flood.Wait()
	defer close(stop)
	count := &tally{last: make(map[catalog.Key]byte)}
	for range 100 {
		b, err := NewBind([]catalog.Peer{peer(carol, carolAddr)}, BindOptions{
			Self: self, Server: serverAddr, Advertise: selfAddr, Services: h.services[:1], Handler: count,
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- b.Run(ctx) }()
		came := count.came.Load()
		eventually(t, "packets come", func() bool { return count.came.Load() > came })
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it did not stop")
		}
	}
}
