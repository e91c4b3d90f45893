package capture

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"culvert/catalog"
	"culvert/internal/testnetns"
)

// echoing hands every packet straight back to the server, as if its peer had
// answered at once.
type echoing struct {
	recorder
	deliver func(from catalog.Key, service string, packets [][]byte) (int, error)
	one     [1][]byte
}

func (e *echoing) Packet(to catalog.Key, service string, payload []byte, _ bool) {
	e.one[0] = payload
	_, _ = e.deliver(to, service, e.one[:])
}

// A bench is a server's socket and a capture before it.
type bench struct {
	server *net.UDPConn
	peer   netip.AddrPort
	cost   []float64 // CPU nanoseconds a packet, there and back, of each round
}

// round sends packets and reads their echoes, a few at a time, and returns what
// one cost.
func (x *bench) round(b *testing.B, packets int) float64 {
	b.Helper()
	const window = 16
	payload, buf := make([]byte, 200), make([]byte, 1024)
	began := cpu(b)
	for range packets / window {
		for range window {
			if _, err := x.server.WriteToUDPAddrPort(payload, x.peer); err != nil {
				b.Fatal(err)
			}
		}
		for range window {
			_ = x.server.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, _, err := x.server.ReadFromUDPAddrPort(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	return float64(cpu(b)-began) / float64(packets)
}

// cpu is what this process has used so far, the kernel's part included: on the
// loopback interface that is all of a packet's way.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

// BenchmarkRedirectAgainstBind measures what a packet costs, from the server to
// the sidecar and back, through redirect and through bind in turns, beside 1,000
// other peers each.
func BenchmarkRedirectAgainstBind(b *testing.B) {
	testnetns.Require(b)
	const packets, turns = 1024, 8
	bind, redirect := benchBind(b), benchRedirect(b)
	for _, x := range []*bench{bind, redirect} {
		x.round(b, packets*turns) // for warming up
	}
	for b.Loop() {
		var sums [2]float64
		for range turns { // short ones: a busy moment of the machine is both's
			sums[0] += bind.round(b, packets)
			sums[1] += redirect.round(b, packets)
		}
		bind.cost, redirect.cost = append(bind.cost, sums[0]/turns), append(redirect.cost, sums[1]/turns)
	}
	ratios := make([]float64, len(bind.cost))
	for i := range ratios {
		ratios[i] = redirect.cost[i] / bind.cost[i]
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(bind.cost), "bind-ns/packet")
	b.ReportMetric(median(redirect.cost), "redirect-ns/packet")
	b.ReportMetric(median(ratios), "redirect/bind")
}

func manyPeers(n int, first netip.Addr) []catalog.Peer {
	peers := make([]catalog.Peer, 0, n)
	for at := first; len(peers) < n; at = at.Next() {
		peers = append(peers, peer(catalog.Key{Datacenter: "dc2", Node: fmt.Sprintf("node-%d", len(peers))}, at))
	}
	return peers
}

func benchServer(b *testing.B, at netip.AddrPort) *net.UDPConn {
	b.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c
}

func running(b *testing.B, run func(context.Context) error) {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
}

func benchBind(b *testing.B) *bench {
	b.Helper()
	peers := manyPeers(100, netip.MustParseAddr("127.92.0.1")) // a socket each: more run into the limit of descriptors
	local := netip.AddrPortFrom(serverAddr, gossipPort)
	h := &echoing{}
	x, err := NewBind(peers, BindOptions{
		Self: self, Server: serverAddr, Advertise: selfAddr, Handler: h,
		Services: []Service{{Name: "gossip-packet", Packet: true, Port: gossipPort, Local: local}},
	})
	if err != nil {
		b.Fatal(err)
	}
	h.deliver = x.Deliver
	running(b, x.Run)
	return &bench{server: benchServer(b, local), peer: netip.AddrPortFrom(peers[50].Advertise, gossipPort)}
}

func benchRedirect(b *testing.B) *bench {
	b.Helper()
	server := netip.MustParseAddr("10.1.0.1")
	peers := manyPeers(1000, netip.MustParseAddr("10.2.0.1"))
	local := netip.AddrPortFrom(server, gossipPort)
	h := &echoing{}
	x, err := NewRedirect(peers, RedirectOptions{
		Self: self, Server: server, Listen: 8443, Handler: h, Open: true,
		Services: []Service{{Name: "gossip-packet", Packet: true, Port: gossipPort, Local: local}},
	})
	if err != nil {
		b.Fatal(err)
	}
	h.deliver = x.Deliver
	running(b, x.Run)
	return &bench{server: benchServer(b, local), peer: netip.AddrPortFrom(peers[500].Advertise, gossipPort)}
}

// BenchmarkRedirectThousandPeers measures, with 1,000 peers and two services, how
// long the start takes, what the process keeps in memory, and how long it takes
// for one peer to come and to go.
func BenchmarkRedirectThousandPeers(b *testing.B) {
	testnetns.Require(b)
	server := netip.MustParseAddr("10.1.0.1")
	local := netip.AddrPortFrom(server, gossipPort)
	peers := manyPeers(1001, netip.MustParseAddr("10.2.0.1"))
	o := RedirectOptions{Self: self, Server: server, Listen: 8443, Handler: &recorder{}, Open: true, Services: []Service{
		{Name: "gossip-packet", Packet: true, Port: gossipPort, Local: local},
		{Name: "gossip-stream", Port: gossipPort, Local: local},
	}}
	var start, change, memory []float64
	for b.Loop() {
		before := heap()
		began := time.Now()
		r, err := NewRedirect(peers[:1000], o)
		if err != nil {
			b.Fatal(err)
		}
		start = append(start, time.Since(began).Seconds()*1e3)
		memory = append(memory, float64(heap()-before)/1024)
		for _, n := range []int{1001, 1000} {
			began := time.Now()
			if err := r.Set(peers[:n]); err != nil {
				b.Fatal(err)
			}
			change = append(change, time.Since(began).Seconds()*1e3)
		}
		r.Close()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(start), "start-ms")
	b.ReportMetric(median(change), "change-ms")
	b.ReportMetric(median(memory), "KiB")
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
