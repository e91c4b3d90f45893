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
	l.cost = nil
	return l
}

// round sends packets and reads the answers, a few at a time.
func (l *load) round(b *testing.B, packets int) {
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
	l.cost = append(l.cost, float64(used(b)-began)/float64(packets))
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
// all, two servers' sockets, two sidecars and TLS between them, with redirect and
// with bind in turns.
func BenchmarkRedirectAgainstBind(b *testing.B) {
	const packets = 4096
	bind, redirect := newLoad(b, newPair(b)), newLoad(b, newRedirectPair(b))
	for b.Loop() {
		bind.round(b, packets)
		redirect.round(b, packets)
	}
	var ratios []float64
	for i := range bind.cost {
		ratios = append(ratios, redirect.cost[i]/bind.cost[i])
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(bind.cost), "bind-ns/packet")
	b.ReportMetric(median(redirect.cost), "redirect-ns/packet")
	b.ReportMetric(median(ratios), "redirect/bind")
}

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}
