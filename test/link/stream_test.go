package link

import (
	"fmt"
	"testing"
	"time"

	"culvert/test/lab"
	"culvert/test/netlab"
)

// congestions are the controls that are measured: what most systems have, and
// what some have by default.
var congestions = []string{"cubic", "bbr"}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// FirstByte is the time from before a connection is made until the first byte
// of its answer, on a link of 100 ms round trip: to a peer that packets and a
// stream went to before, and to one that this sidecar has had nothing to do
// with since both started.
func BenchmarkFirstByte(b *testing.B) {
	require(b)
	const roundTrip = 100 * time.Millisecond
	w := newWorld(b, plan{hosts: [2]int{1, 1}, way: netlab.Way{Delay: roundTrip / 2}, congestion: "cubic"})
	near, far := w.servers[0], w.servers[1]
	client := respond(b, near)
	respond(b, far)
	kinds := []struct {
		name    string
		address string
		cold    bool
	}{
		{"plain TCP", lab.HostPort(far.host.Addr, gossipPort), false},
		{"warm, gossip-stream", lab.HostPort(far.virtual, gossipPort), false},
		{"warm, another service", lab.HostPort(far.virtual, bulkPort), false},
		{"cold, gossip-stream", lab.HostPort(far.virtual, gossipPort), true},
		{"cold, another service", lab.HostPort(far.virtual, bulkPort), true},
	}
	took := make([][]float64, len(kinds))
	for b.Loop() {
		for i, k := range kinds {
			if k.cold {
				w.restart()
			} else {
				warm(b, client, far)
				if _, err := fetch(near.host, k.address, 1); err != nil {
					b.Fatalf("%s: %v", k.name, err)
				}
			}
			d, err := fetch(near.host, k.address, 1)
			if err != nil {
				b.Fatalf("%s: %v", k.name, err)
			}
			took[i] = append(took[i], ms(d))
		}
	}
	w.check()
	b.ReportMetric(0, "ns/op")
	for i, k := range kinds {
		m := median(took[i])
		b.ReportMetric(m, []string{"plain-ms", "warm-ms", "warm-other-ms", "cold-ms", "cold-other-ms"}[i])
		tables.add(fmt.Sprintf("First answer byte of a new stream, %v round trip, medians of %d", roundTrip, len(took[i])),
			[]string{"", "ms", "round trips"}, []string{k.name, fmt.Sprintf("%.1f", m), fmt.Sprintf("%.2f", m/ms(roundTrip))})
	}
}

// Stream is one transfer to its end, connection included, against plain TCP.
func BenchmarkStream(b *testing.B) {
	require(b)
	const roundTrip, rate = 100 * time.Millisecond, 400e6
	size := uint64(64 << 20)
	if testing.Short() {
		size = 1 << 20
	}
	for _, congestion := range congestions {
		b.Run(congestion, func(b *testing.B) {
			way := netlab.Way{Delay: roundTrip / 2, Rate: rate, Queue: int(rate / 8 * roundTrip.Seconds())}
			w := newWorld(b, plan{hosts: [2]int{1, 1}, way: way, congestion: congestion})
			near, far := w.servers[0], w.servers[1]
			client := respond(b, near)
			respond(b, far)
			warm(b, client, far)
			var rates [3][]float64 // plain, bulk, gossip-stream
			for b.Loop() {
				for i, address := range []string{
					lab.HostPort(far.host.Addr, bulkPort), lab.HostPort(far.virtual, bulkPort), lab.HostPort(far.virtual, gossipPort),
				} {
					d, err := fetch(near.host, address, size)
					if err != nil {
						b.Fatalf("%s: %v", address, err)
					}
					rates[i] = append(rates[i], float64(size)*8/d.Seconds()/1e6)
				}
			}
			w.check()
			plain, bulk, gossip := median(rates[0]), median(rates[1]), median(rates[2])
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(plain, "plain-Mbit/s")
			b.ReportMetric(bulk, "ours-Mbit/s")
			b.ReportMetric(bulk/plain, "ours/plain")
			b.ReportMetric(gossip/plain, "ours-gossip/plain")
			tables.add(fmt.Sprintf("A stream of %d MiB, %v round trip, %.0f Mbit/s, connection included: Mbit/s, medians of %d", size>>20, roundTrip, rate/1e6, len(rates[0])),
				[]string{"", "plain TCP", "a service of its own", "ratio", "gossip-stream", "ratio"},
				[]string{congestion, fmt.Sprintf("%.0f", plain), fmt.Sprintf("%.0f", bulk), fmt.Sprintf("%.2f", bulk/plain), fmt.Sprintf("%.0f", gossip), fmt.Sprintf("%.2f", gossip/plain)})
		})
	}
}
