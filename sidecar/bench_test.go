package sidecar

import (
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"
)

// A load is packets between two servers and back, beneath whichever capture.
type load struct {
	*pair
	to   netip.AddrPort
	cost []float64 // CPU nanoseconds a packet and its answer, of each round
}

func newLoad(b *testing.B, p *pair) *load {
	b.Helper()
	echo := p.bob.udp
	go func() {
		buf := make([]byte, 1024)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	l := &load{pair: p, to: netip.AddrPortFrom(p.alice.cfg.Peers[0].Advertise, port)}
	l.round(b, 16) // the link is dialled
	l.round(b, 2048)
	return l
}

// round sends packets and reads the answers, a few at a time, and returns what
// one cost.
func (l *load) round(b *testing.B, packets int) float64 {
	b.Helper()
	const window = 16
	payload, buf := make([]byte, 200), make([]byte, 1024)
	server := l.alice.udp
	began := used(b)
	for range packets / window {
		for range window {
			if _, err := server.WriteToUDPAddrPort(payload, l.to); err != nil {
				b.Fatal(err)
			}
		}
		for range window {
			_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, _, err := server.ReadFromUDPAddrPort(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	return float64(used(b)-began) / float64(packets)
}

// used is the CPU time of this process so far, the kernel's part included.
func used(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRedirectAgainstBind measures what a packet and its answer cost all in
// all, two servers' sockets, two sidecars and TLS between them, in turns with bind
// at both ends and with redirect at one. The ratio is for redirect at both ends: as
// two hosts cannot share one set of rules here, what it costs more at one end counts
// twice. The rules see bind's packets too, as on a host with both; what bind costs
// on a host without any rules is measured before.
func BenchmarkRedirectAgainstBind(b *testing.B) {
	const packets, turns = 1024, 8
	bind := newLoad(b, newPair(b))
	var alone []float64
	for range 10 {
		alone = append(alone, bind.round(b, packets*turns))
	}
	mixed := newLoad(b, newMixedPair(b))
	for b.Loop() {
		var sums [2]float64
		for range turns { // short ones: a busy moment of the machine is both's
			sums[0] += bind.round(b, packets)
			sums[1] += mixed.round(b, packets)
		}
		bind.cost, mixed.cost = append(bind.cost, sums[0]/turns), append(mixed.cost, sums[1]/turns)
	}
	var both, ratios []float64
	for i, c := range bind.cost {
		both = append(both, 2*mixed.cost[i]-c)
		ratios = append(ratios, both[i]/c)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(alone), "bare-ns/packet")
	b.ReportMetric(median(bind.cost), "bind-ns/packet")
	b.ReportMetric(median(both), "redirect-ns/packet")
	b.ReportMetric(median(ratios), "redirect/bind")
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}
