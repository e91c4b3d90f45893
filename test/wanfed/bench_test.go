package wanfed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// What a packet costs by two sidecars, from a server's UDP socket to the other's,
// against the sum of its parts, each bare: Consul's transport, and a hop by UDP on
// each side.

const (
	payload = 512 // bytes of a packet

	rounds   = 7
	flood    = 30_000 // packets of a round, as fast as they go
	pings    = 600    // of a round, one at a time
	pingGap  = 500 * time.Microsecond
	inFlight = 256 // packets of a flood that are under way at most
)

// sidecarPair is two sidecars that reach each other directly, and a socket of this
// process for each one's server.
type sidecarPair struct {
	*world
	daemons  [2]*daemon
	udp      [2]*net.UDPConn
	to       [2]netip.AddrPort // where each server sees the other
	received [2]atomic.Int64
	pong     chan struct{}
}

// newSidecarPair puts them at 127.n.first.0/24 and 127.n.first+1.0/24.
func newSidecarPair(w *world, first int) *sidecarPair {
	w.t.Helper()
	p := &sidecarPair{world: w, pong: make(chan struct{}, 1)}
	for i := range 2 {
		p.to[i] = netip.MustParseAddrPort(w.at(first+1-i, 1, gossipPort))
		var err error
		if p.udp[i], err = listenUDP(w.at(first+i, 11, gossipPort)); err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { _ = p.udp[i].Close() })
		p.daemons[i] = p.start(first+i, first+1-i)
		go p.take(i)
	}
	eventually(w.t, func() error {
		for i, d := range p.daemons {
			if st := d.peer(fmt.Sprintf("node%d", first+1-i)); st.State != "up" {
				return fmt.Errorf("%s says %s: %s", d.name, st.State, st.LastError)
			}
		}
		return nil
	})
	return p
}

// start starts the sidecar of a site whose peer is at another.
func (p *sidecarPair) start(site, other int) *daemon {
	p.t.Helper()
	c := p.pki.server(dcName(site), fmt.Sprintf("node%d", site))
	return start(p.t, fmt.Sprintf("sidecar-%d", site), p.at(site, 11, 7440), "sidecar", fmt.Sprintf(`datacenter = "dc%[1]d"
node = "node%[1]d"
server {
  profile   = "consul"
  address   = %[3]q
  advertise = %[4]q
  hairpin   = false
}
listen { address = %[5]q }
admin { address = %[6]q }
tls {
  ca_file   = %[7]q
  cert_file = %[8]q
  key_file  = %[9]q
}
peer "node%[2]d" {
  datacenter = "dc%[2]d"
  advertise  = %[10]q
  address    = %[11]q
}
datacenter "dc%[2]d" { mode = "direct" }
`, site, other, p.addr(site, 11), p.addr(site, 1), p.at(site, 11, tlsPort), p.at(site, 11, 7440),
		c.ca, c.cert, c.key, p.addr(other, 1), p.at(other, 11, tlsPort)))
}

// take is what the servers do with what comes.
func (p *sidecarPair) take(i int) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := p.udp[i].ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		switch buf[0] {
		case counted:
			p.received[i].Add(1)
		case pinged:
			buf[0] = ponged
			_, _ = p.udp[i].WriteToUDPAddrPort(buf[:n], from) // lost like any packet
		case ponged:
			select {
			case p.pong <- struct{}{}:
			default:
			}
		}
	}
}

// flood sends packets as fast as they arrive, and returns how many did.
func (p *sidecarPair) flood(count int) int {
	packet := make([]byte, payload)
	packet[0] = counted
	before := p.received[1].Load()
	for sent := range count {
		for wait := time.Now(); int64(sent)-(p.received[1].Load()-before) >= inFlight && time.Since(wait) < time.Second; {
			time.Sleep(20 * time.Microsecond)
		}
		if _, err := p.udp[0].WriteToUDPAddrPort(packet, p.to[0]); err != nil {
			p.t.Fatal(err)
		}
	}
	for wait := time.Now(); p.received[1].Load()-before < int64(count) && time.Since(wait) < time.Second; {
		time.Sleep(time.Millisecond)
	}
	return int(p.received[1].Load() - before)
}

func (p *sidecarPair) ping(count int) (rtts []time.Duration) {
	packet := make([]byte, payload)
	for range count {
		packet[0] = pinged
		began := time.Now()
		if _, err := p.udp[0].WriteToUDPAddrPort(packet, p.to[0]); err != nil {
			p.t.Fatal(err)
		}
		select {
		case <-p.pong:
			rtts = append(rtts, time.Since(began))
		case <-time.After(time.Second):
		}
		time.Sleep(pingGap)
	}
	return rtts
}

// processor is the CPU time of processes, all their threads together, by the
// scheduler's own count (proc(5), /proc/pid/task/tid/schedstat).
func processor(t testing.TB, pids ...int) time.Duration {
	t.Helper()
	var sum time.Duration
	for _, pid := range pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			t.Fatalf("no threads of %d: %v", pid, err)
		}
		for _, task := range tasks {
			text, err := os.ReadFile(task)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			var ran time.Duration
			if _, scan := fmt.Sscan(string(text), &ran); err != nil || scan != nil {
				t.Fatalf("%s: %v, %v", task, err, scan)
			}
			sum += ran
		}
	}
	return sum
}

// A column is what was measured of one transport, an entry a round.
type column struct {
	cpu      []float64 // microseconds a packet
	rate     []float64 // thousand packets a second
	p50, p99 []float64 // of round trips, in microseconds
}

func (c *column) round(cpu time.Duration, packets int, took time.Duration, rtts []time.Duration) {
	c.cpu = append(c.cpu, float64(cpu)/float64(packets)/1e3)
	c.rate = append(c.rate, float64(packets)/took.Seconds()/1e3)
	c.p50, c.p99 = append(c.p50, quantile(rtts, 0.5)), append(c.p99, quantile(rtts, 0.99))
}

func median(of []float64) float64 { return slices.Sorted(slices.Values(of))[len(of)/2] }

// BenchmarkAgainstWanfed prints the table of docs/performance.md.
func BenchmarkAgainstWanfed(b *testing.B) {
	w := newWorld(b, consulPKI(b))
	ours := newSidecarPair(w, 1)
	ends := w.startEnds(3)
	sidecars := []int{ours.daemons[0].cmd.Process.Pid, ours.daemons[1].cmd.Process.Pid}
	endPids := []int{ends[0].cmd.Process.Pid, ends[1].cmd.Process.Pid}
	var table [3]column
	ours.flood(1000)
	for _, by := range []string{"wanfed", "udp"} {
		ends[0].ask(request{Do: "send", By: by, Count: 200, Size: payload})
		ends[1].ask(request{Do: "await", By: by, Count: 200})
	}
	for b.Loop() {
		for range rounds {
			cpu, began := processor(b, sidecars...), time.Now()
			arrived := ours.flood(flood)
			took := time.Since(began)
			cpu = processor(b, sidecars...) - cpu
			if arrived < flood*99/100 {
				b.Fatalf("%d of %d packets arrived", arrived, flood)
			}
			table[0].round(cpu, arrived, took, ours.ping(pings))
			for i, by := range []string{"wanfed", "udp"} {
				ends[1].ask(request{Do: "reset", By: by})
				cpu, began := processor(b, endPids...), time.Now()
				ends[0].ask(request{Do: "send", By: by, Count: flood, Size: payload})
				arrived := int(ends[1].ask(request{Do: "await", By: by, Count: flood}).RTTs[0])
				took := time.Since(began)
				cpu = processor(b, endPids...) - cpu
				rtts := ends[0].ask(request{Do: "ping", By: by, Count: pings, Size: payload, Gap: pingGap}).RTTs
				if arrived < flood*99/100 {
					b.Fatalf("%d of %d packets arrived by %s", arrived, flood, by)
				}
				table[1+i].round(cpu, arrived, took, rtts)
			}
		}
	}
	report(b, table)
}

func report(b *testing.B, table [3]column) {
	b.Helper()
	ratio := func(of func(c *column) []float64, hops float64) float64 {
		var all []float64
		for i, ours := range of(&table[0]) {
			all = append(all, ours/(of(&table[1])[i]+hops*of(&table[2])[i]))
		}
		return median(all)
	}
	cpu := func(c *column) []float64 { return c.cpu }
	p50 := func(c *column) []float64 { return c.p50 }
	p99 := func(c *column) []float64 { return c.p99 }
	for i, name := range []string{"culvert", "wanfed", "udp"} {
		c := &table[i]
		b.Logf("%-8s cpu %6.2f us/packet at %4.0f k/s, round trip p50 %6.1f us, p99 %6.1f us",
			name, median(c.cpu), median(c.rate), median(c.p50), median(c.p99))
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ratio(cpu, 2), "cpu/(wanfed+2udp)")
	b.ReportMetric(ratio(cpu, 1), "cpu/(wanfed+1udp)")
	b.ReportMetric(ratio(p50, 2), "p50/(wanfed+2udp)")
	b.ReportMetric(ratio(p99, 2), "p99/(wanfed+2udp)")
}

// startEnds starts two ends of Consul's transport, at sites of the world.
func (w *world) startEnds(first int) (ends [2]*remoteEnd) {
	w.t.Helper()
	for i := range 2 {
		at, other := first+i, first+1-i
		c := w.pki.native(dcName(at), fmt.Sprintf("node%d", at))
		ends[i] = startEnd(w.t, endConfig{
			DC: dcName(at), Node: fmt.Sprintf("node%d", at), CA: c.ca, Cert: c.cert, Key: c.key,
			Gossip: w.at(at, 11, gossipPort), RPC: w.at(at, 11, rpcPort), UDP: w.at(at, 11, 9000),
			Other: w.at(other, 11, rpcPort), OtherNode: fmt.Sprintf("node%d.dc%d", other, other), OtherUDP: w.at(other, 11, 9000),
		})
	}
	for _, e := range ends {
		e.ask(request{Do: "reset", By: "udp"}) // which it answers once it listens
	}
	return ends
}

func dcName(site int) string { return fmt.Sprintf("dc%d", site) }
