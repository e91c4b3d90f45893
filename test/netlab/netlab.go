// Package netlab emulates a link between two hosts of a lab: a TUN device in
// each, and between them a delay line that holds packets back, drops some,
// and lets through only so many a second, each way by settings of its own that
// may change while packets are under way.
//
//	net, link := netlab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1}, netlab.Way{Delay: 50 * time.Millisecond})
//	link.Set(netlab.Way{Rate: 100e6}, netlab.Way{})
//
// A way is one thread that waits in ppoll(2) for whatever comes first, a packet
// or the time of one that is due. It runs under SCHED_FIFO, so that other
// work on the machine does not show as delay, and packets on a way allocate
// nothing. Packets are what crosses a real link, 1500 bytes at most: segments
// of 64 KiB, which TUN devices can carry, would be lost, queued and delayed as
// one. Checksums alone are left to the device (IFF_VNET_HDR, TUN_F_CSUM) and
// so never computed, as with any network card.
//
// All methods may be called from any goroutine. What netlab is not: a model of a
// shared medium (ways do not compete), or of losses that come in bursts.
package netlab

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/test/lab"
)

// Device is the name of the link's device on both hosts: the one that lab gives
// the WAN link, so that its faults, guards and taps work on it.
const Device = "wan0"

// procs is what GOMAXPROCS must be at least: a way's thread that comes back
// from the kernel needs a free processor of the runtime at once.
const procs = 8

// A Way says what happens to packets in one direction. Its zero value is a
// link of no delay, no loss and no end of capacity.
type Way struct {
	Delay time.Duration
	// Jitter is how much longer a packet may take, evenly spread. Packets stay
	// in order: one that would overtake another arrives with it.
	Jitter time.Duration
	// Loss is the share of packets that get lost, each by itself, after they
	// have taken their part of the rate.
	Loss float64
	// Rate is in bits a second, of IP packets with their headers; 0 sets no
	// limit.
	Rate float64
	// Queue is how many bytes may wait for the rate; what comes then is dropped.
	// 0 means as many as the rate carries in 100 ms.
	Queue int
	// Reorder is the share of packets that are held back for Behind (0 means
	// 5 ms) so that those after them overtake.
	Reorder float64
	Behind  time.Duration
}

// defaults of a Way.
const (
	defaultQueue  = 100 * time.Millisecond
	defaultBehind = 5 * time.Millisecond
)

// check completes a way.
func (w Way) check(t testing.TB) *Way {
	t.Helper()
	share := func(name string, v float64) {
		if v < 0 || v > 1 {
			t.Fatalf("netlab: %s is %v, want 0 to 1", name, v)
		}
	}
	share("Loss", w.Loss)
	share("Reorder", w.Reorder)
	if w.Delay < 0 || w.Jitter < 0 || w.Behind < 0 || w.Rate < 0 || w.Queue < 0 {
		t.Fatalf("netlab: %+v has something below zero", w)
	}
	if w.Queue == 0 {
		w.Queue = int(w.Rate / 8 * defaultQueue.Seconds())
	}
	if w.Behind == 0 {
		w.Behind = defaultBehind
	}
	return &w
}

// Counts are of the packets of one way since it was made.
type Counts struct {
	Passed      uint64 // handed to the far end
	PassedBytes uint64
	Lost        uint64 // by Loss
	QueueFull   uint64 // by Queue
	Waiting     uint64 // under way now
	// Refused by the far end, which was down, and Missed by this package: the
	// near end had more than the way could take in. Of the latter there should
	// be none: they are in no setting.
	Refused, Missed uint64
}

// A Link is the two ways between two hosts.
type Link struct {
	t    testing.TB
	ways [2]*way // from the first host, and from the second
	wake int     // an eventfd that ends both
	wg   sync.WaitGroup
}

// Connect links two hosts, neither of which has a [Device] yet, until the test
// ends. The devices are down and have no addresses.
func Connect(t testing.TB, a, b *lab.Host, both Way) *Link {
	t.Helper()
	l := &Link{t: t}
	if runtime.GOMAXPROCS(0) < procs {
		runtime.GOMAXPROCS(procs)
	}
	if err := l.open([2]*lab.Host{a, b}); err != nil {
		l.close()
		t.Fatalf("netlab: %v", err)
	}
	l.Set(both, both)
	for _, w := range l.ways {
		ready := make(chan error)
		l.wg.Go(func() { w.run(ready) })
		if err := <-ready; err != nil {
			t.Errorf("netlab: %v", err)
		}
	}
	t.Cleanup(l.close)
	return l
}

// TwoSites is [lab.TwoSites] with an emulated WAN link. The first way is from
// dc1 to dc2.
func TwoSites(t testing.TB, o lab.Options, both Way) (*lab.Network, *Link) {
	t.Helper()
	var l *Link
	o.WAN = func(a, b *lab.Host) { l = Connect(t, a, b, both) }
	return lab.TwoSites(t, o), l
}

func (l *Link) open(hosts [2]*lab.Host) error {
	wake, err := newWake()
	if err != nil {
		return err
	}
	l.wake = wake
	var fds [2]int
	for i, h := range hosts {
		if fds[i], err = openTUN(h); err != nil {
			return fmt.Errorf("make %s on %s: %w", Device, h.Name, err)
		}
		seed := rand.NewPCG(uint64(os.Getpid()), uint64(i))
		l.ways[i] = &way{host: h, in: fds[i], wake: wake, line: line{random: rand.New(seed)}}
	}
	l.ways[0].out, l.ways[1].out = fds[1], fds[0]
	return nil
}

// close ends the link: its devices go with it.
func (l *Link) close() {
	if l.wake != 0 {
		if err := ring(l.wake); err != nil {
			l.t.Errorf("netlab: end the ways: %v", err)
		}
	}
	l.wg.Wait()
	for _, w := range l.ways {
		if w != nil {
			closeFD(w.in)
		}
	}
	if l.wake != 0 {
		closeFD(l.wake)
	}
}

// Set changes both ways: from the first host to the second, and back. What is
// under way arrives when it would have without the change.
func (l *Link) Set(there, back Way) {
	l.t.Helper()
	l.ways[0].setting.Store(there.check(l.t))
	l.ways[1].setting.Store(back.check(l.t))
}

// Counts returns those of both ways.
func (l *Link) Counts() (there, back Counts) {
	l.t.Helper()
	return l.counts(l.ways[0]), l.counts(l.ways[1])
}

func (l *Link) counts(w *way) Counts {
	l.t.Helper()
	missed, err := w.host.Run("cat", filepath.Join("/sys/class/net", Device, "statistics/tx_dropped"))
	if err != nil {
		l.t.Fatal(err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(missed), 10, 64)
	if err != nil {
		l.t.Fatal(err)
	}
	c := w.counts.load()
	c.Missed += n
	return c
}

// CPU is the processor time that both ways have used: the link's own, and what
// the kernel does for a packet until it waits in a socket of the far end.
func (l *Link) CPU() time.Duration {
	l.t.Helper()
	var sum time.Duration
	for _, w := range l.ways {
		d, err := threadCPU(int(w.thread.Load()))
		if err != nil {
			l.t.Fatal(err)
		}
		sum += d
	}
	return sum
}

// tallies are what a way counts while it runs.
type tallies struct {
	passed, bytes, lost, full, waiting, refused, missed atomic.Uint64
}

func (c *tallies) load() Counts {
	return Counts{
		Passed: c.passed.Load(), PassedBytes: c.bytes.Load(), Lost: c.lost.Load(), QueueFull: c.full.Load(),
		Waiting: c.waiting.Load(), Refused: c.refused.Load(), Missed: c.missed.Load(),
	}
}
