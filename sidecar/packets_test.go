package sidecar

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// From the socket of one server to the socket of the other, through two sidecars
// and TLS, a packet allocates nothing. What the process allocates beside that
// (timers, the locator's looks at its paths) does not grow with the packets. `make
// test` runs it without the race detector too.
func TestPacketAllocatesNothing(t *testing.T) {
	p := newPair(t)
	a, b := p.alice.udp, p.bob.udp
	toBob, toAlice := netip.AddrPortFrom(p.addr(2, 1), port), netip.AddrPortFrom(p.addr(1, 1), port)
	payload, buf := make([]byte, 512), make([]byte, 2048)
	cross := func(from, to *net.UDPConn, at netip.AddrPort, window int) {
		for range window {
			if _, err := from.WriteToUDPAddrPort(payload, at); err != nil {
				t.Fatal(err)
			}
		}
		for range window {
			if _, _, err := to.ReadFromUDPAddrPort(buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The handshakes of the sessions that are made at the start are none of it.
	eventually(t, func() error {
		for _, s := range []*side{p.alice, p.bob} {
			if s.Status().Peers[0].Sessions == 0 {
				return errors.New("no session yet")
			}
		}
		return nil
	})
	_ = a.SetReadDeadline(time.Now().Add(time.Minute))
	_ = b.SetReadDeadline(time.Now().Add(time.Minute))
	for _, window := range []int{1, 32} { // one at a time, and many to a record
		rounds := func(packets int) {
			for range packets / 2 / window {
				cross(a, b, toBob, window)
				cross(b, a, toAlice, window)
			}
		}
		rounds(4096) // buffers are made
		const packets = 20480
		defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which would empty pools
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		rounds(packets)
		runtime.ReadMemStats(&after)
		got := after.Mallocs - before.Mallocs
		t.Logf("%d at a time: %d allocations for %d packets", window, got, packets)
		limit := uint64(packets / 100)
		if raced {
			limit = packets // crypto/tls has a sync.Pool, which loses a fourth of what it is given then
		}
		if got > limit {
			t.Errorf("%d at a time: %d allocations for %d packets", window, got, packets)
		}
	}
}

// BenchmarkPackets is what a packet of 512 bytes costs from a server's socket to the
// other's, everything of this process included, one at a time and many.
func BenchmarkPackets(b *testing.B) {
	for name, window := range map[string]int{"single": 1, "window": 64} {
		b.Run(name, func(b *testing.B) {
			p := newPair(b)
			from, to := p.alice.udp, p.bob.udp
			at := netip.AddrPortFrom(p.addr(2, 1), port)
			payload, buf := make([]byte, 512), make([]byte, 2048)
			round := func() {
				for range window {
					_, _ = from.WriteToUDPAddrPort(payload, at)
				}
				for range window {
					_ = to.SetReadDeadline(time.Now().Add(time.Second))
					if _, _, err := to.ReadFromUDPAddrPort(buf); err != nil {
						b.Fatal(err)
					}
				}
			}
			round()
			cpu, packets := used(b), 0
			for b.Loop() {
				round()
				packets += window
			}
			cpu = used(b) - cpu
			b.ReportMetric(float64(cpu)/float64(packets), "cpu-ns/packet")
			b.ReportMetric(float64(b.Elapsed())/float64(packets), "ns/packet")
		})
	}
}
