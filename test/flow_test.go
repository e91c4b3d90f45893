package test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"sync"
	"testing"
	"time"

	"culvert/test/lab"
)

// probePort is a packet service of the tests' own, beside serf's.
const probePort = 7999

// probeService is its block in a sidecar's configuration.
const probeService = `service "probe" {
  kind = "packet"
  port = 7999
}
`

// flowEvery is the time between two packets of a flow.
const flowEvery = 10 * time.Millisecond

// A flow is a steady stream of packets from one server to another, sent and
// received where the servers send and receive.
type flow struct {
	t        *testing.T
	from, to *server
	out      *net.UDPConn

	mu       sync.Mutex
	sent     uint64
	arrivals []time.Time
	seen     map[uint64]bool // numbers of those that arrived
	sources  map[string]int
}

// startFlow sends until the test ends.
func startFlow(t *testing.T, from, to *server) *flow {
	t.Helper()
	f := &flow{t: t, from: from, to: to, seen: make(map[uint64]bool), sources: make(map[string]int)}
	in, err := to.host.ListenPacket(lab.HostPort(to.host.Addr, probePort))
	if err != nil {
		t.Fatal(err)
	}
	f.out, err = from.host.ListenPacket(lab.HostPort(from.host.Addr, 0))
	if err != nil {
		t.Fatal(err)
	}
	target := net.UDPAddrFromAddrPort(addrPort(to.advertise, probePort))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(flowEvery)
		defer tick.Stop()
		payload := make([]byte, 100)
		for i := uint64(0); ; i++ {
			select {
			case <-tick.C:
			case <-stop:
				return
			}
			binary.BigEndian.PutUint64(payload, i)
			_, _ = f.out.WriteToUDP(payload, target) // refused while a sidecar restarts
			f.mu.Lock()
			f.sent = i + 1
			f.mu.Unlock()
		}
	})
	wg.Go(func() { f.receive(in) })
	t.Cleanup(func() {
		close(stop)
		_ = in.Close()
		_ = f.out.Close()
		wg.Wait()
	})
	return f
}

func (f *flow) receive(in *net.UDPConn) {
	buf := make([]byte, 1024)
	for {
		n, src, err := in.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		f.mu.Lock()
		if n >= 8 {
			f.seen[binary.BigEndian.Uint64(buf)] = true
		}
		f.arrivals = append(f.arrivals, time.Now())
		f.sources[src.Addr().String()]++
		f.mu.Unlock()
	}
}

// wantWhole checks that all that was sent since the first that arrived has
// arrived, or does within a second.
func (f *flow) wantWhole() {
	f.t.Helper()
	f.mu.Lock()
	sent := f.sent
	f.mu.Unlock()
	lab.Eventually(f.t, time.Second, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		first, missing := uint64(0), 0
		for first < sent && !f.seen[first] {
			first++
		}
		for i := first; i < sent; i++ {
			if !f.seen[i] {
				missing++
			}
		}
		if missing > 0 || first == sent {
			return fmt.Errorf("%d of %d packets from %s to %s were lost", missing, sent-first, f.from.node, f.to.node)
		}
		return nil
	})
}

// seenFrom are the addresses that packets came from, and how many from each.
func (f *flow) seenFrom() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.sources)
}

// firstAfter is when the first packet arrived after a moment; ok is false if
// none has yet.
func (f *flow) firstAfter(moment time.Time) (time.Time, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, at := range f.arrivals {
		if at.After(moment) {
			return at, true
		}
	}
	return time.Time{}, false
}

// longestGap is the longest time between two arrivals since a moment.
func (f *flow) longestGap(since time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	var longest time.Duration
	last := since
	for _, at := range f.arrivals {
		if at.After(since) {
			longest = max(longest, at.Sub(last))
			last = at
		}
	}
	return longest
}

// await waits for a packet that arrives after a moment, and returns how long
// after that was.
func (f *flow) await(moment time.Time, limit time.Duration) time.Duration {
	f.t.Helper()
	var at time.Time
	lab.Eventually(f.t, limit, func() error {
		var ok bool
		if at, ok = f.firstAfter(moment); !ok {
			return fmt.Errorf("no packet from %s to %s", f.from.node, f.to.node)
		}
		return nil
	})
	return at.Sub(moment)
}
