package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"culvert/test/lab"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

const (
	port    = 7000
	payload = 1000
	headers = 28 // of IPv4 and UDP
)

// An arrival is a packet that came, and how long it took by the kernel's clock.
type arrival struct {
	n    uint64
	at   time.Time
	took time.Duration
}

// A probe sends numbered packets from one gateway's host to the other.
type probe struct {
	t       *testing.T
	in, out *net.UDPConn
	wg      sync.WaitGroup
	late    []time.Duration // how much later than it had asked for the sender woke, each time

	mu  sync.Mutex
	got []arrival
}

func newProbe(t *testing.T, n *lab.Network, from int) *probe {
	t.Helper()
	p := &probe{t: t}
	to := n.Sites[1-from]
	var err error
	if p.in, err = to.Gateway.ListenPacket(lab.HostPort(to.WAN, port)); err != nil {
		t.Fatal(err)
	}
	// One that is read too late must not lose what the link has carried.
	raw, err := p.in.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err2 := raw.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	})
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	c, err := n.Sites[from].Gateway.Dial("udp", lab.HostPort(to.WAN, port))
	if err != nil {
		t.Fatal(err)
	}
	p.out = c.(*net.UDPConn)
	p.wg.Go(p.receive)
	t.Cleanup(func() {
		_ = p.in.Close()
		_ = p.out.Close()
		p.wg.Wait()
	})
	return p
}

func (p *probe) receive() {
	buf, oob := make([]byte, 2048), make([]byte, 128)
	for {
		n, oobn, _, _, err := p.in.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n < 16 {
			p.t.Errorf("receive %d bytes: %v", n, err)
			return
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			p.t.Errorf("%d control messages: %v", len(messages), err)
			return
		}
		data := messages[0].Data // a struct timespec
		at := time.Unix(int64(binary.NativeEndian.Uint64(data)), int64(binary.NativeEndian.Uint64(data[8:])))
		sent := time.Unix(0, int64(binary.BigEndian.Uint64(buf[8:])))
		p.mu.Lock()
		p.got = append(p.got, arrival{binary.BigEndian.Uint64(buf), at, at.Sub(sent)})
		p.mu.Unlock()
	}
}

// send sends n packets, one each interval; with none as fast as it can. It
// does so with the priority that the link itself has: where the test was held
// up, it would count as the link's delay.
func (p *probe) send(n int, interval time.Duration) {
	p.t.Helper()
	p.mu.Lock()
	p.got = nil
	p.mu.Unlock()
	done := make(chan error)
	go func() { done <- p.sendFirst(n, interval) }()
	if err := <-done; err != nil {
		p.t.Fatal(err)
	}
}

func (p *probe) sendFirst(n int, interval time.Duration) error {
	if err := foremost(); err != nil {
		return err
	}
	buf := make([]byte, payload)
	p.late = make([]time.Duration, n)
	begin := time.Now()
	for i := range n {
		at := begin.Add(time.Duration(i) * interval)
		if d := time.Until(at); d > 0 {
			t := unix.NsecToTimespec(int64(d))
			_, _ = unix.Ppoll(nil, &t, nil)
		}
		p.late[i] = time.Since(at)
		binary.BigEndian.PutUint64(buf, uint64(i))
		binary.BigEndian.PutUint64(buf[8:], uint64(time.Now().UnixNano()))
		if _, err := p.out.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

// arrived waits until nothing is under way, and all that has passed since a
// count was taken has been received, and returns it.
func (p *probe) arrived(way func() Counts, since Counts) []arrival {
	p.t.Helper()
	var got []arrival
	lab.Eventually(p.t, 20*time.Second, func() error {
		p.mu.Lock()
		got = slices.Clone(p.got)
		p.mu.Unlock()
		c := way()
		if passed := c.Passed - since.Passed; c.Waiting > 0 || uint64(len(got)) != passed {
			return fmt.Errorf("%d packets are under way, %d have passed, %d were received", c.Waiting, passed, len(got))
		}
		return nil
	})
	return got
}

func there(l *Link) func() Counts {
	return func() Counts { c, _ := l.Counts(); return c }
}

func back(l *Link) func() Counts {
	return func() Counts { _, c := l.Counts(); return c }
}

// quantile of how long packets took.
func quantile(got []arrival, q float64) time.Duration {
	took := make([]time.Duration, len(got))
	for i, a := range got {
		took[i] = a.took
	}
	return quantileOf(took, q)
}

func quantileOf(d []time.Duration, q float64) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[int(q*float64(len(d)-1))]
}

// The link does what it was set to: delay within 1 ms, loss within a tenth,
// rate within 3 %, each way by itself, and what it was set to anew while it runs.
func TestLink(t *testing.T) {
	lab.Require(t)
	n, link := TwoSites(t, lab.Options{}, Way{})
	forth, home := newProbe(t, n, 0), newProbe(t, n, 1)

	t.Run("delay", func(t *testing.T) {
		for _, d := range [][2]time.Duration{{50 * time.Millisecond, 10 * time.Millisecond}, {0, 100 * time.Millisecond}} {
			link.Set(Way{Delay: d[0]}, Way{Delay: d[1]})
			checkDelay(t, forth, there(link), d[0])
			checkDelay(t, home, back(link), d[1])
		}
	})

	t.Run("loss", func(t *testing.T) {
		link.Set(Way{Loss: 0.02}, Way{})
		before, _ := link.Counts()
		const rounds, each = 20, 5000 // as many at a time as the socket holds
		const sent = rounds * each
		got := 0
		for range rounds {
			begin, _ := link.Counts()
			forth.send(each, 20*time.Microsecond)
			got += len(forth.arrived(there(link), begin))
		}
		after, _ := link.Counts()
		share := 1 - float64(got)/sent
		t.Logf("%.4f lost, where 0.02 was set", share)
		if math.Abs(share-0.02) > 0.002 {
			t.Errorf("%.4f of the packets are lost, want 0.018 to 0.022", share)
		}
		if lost, passed := after.Lost-before.Lost, after.Passed-before.Passed; lost != uint64(sent-got) || passed != uint64(got) {
			t.Errorf("counted are %d lost and %d passed, want %d and %d", lost, passed, sent-got, got)
		}
		if bytes := after.PassedBytes - before.PassedBytes; bytes != uint64(got*(payload+headers)) {
			t.Errorf("%d bytes are counted, want %d", bytes, got*(payload+headers))
		}
	})

	t.Run("rate", func(t *testing.T) {
		for _, rate := range []float64{10e6, 100e6} {
			checkRate(t, link, forth, rate)
		}
	})

	t.Run("reordering", func(t *testing.T) {
		link.Set(Way{Delay: 10 * time.Millisecond, Reorder: 0.1, Behind: 5 * time.Millisecond}, Way{})
		before, _ := link.Counts()
		forth.send(1000, time.Millisecond)
		got := forth.arrived(there(link), before)
		overtaken := 0
		for i := 1; i < len(got); i++ {
			if got[i].n < got[i-1].n {
				overtaken++
			}
		}
		if len(got) != 1000 || overtaken < 60 || overtaken > 140 {
			t.Errorf("%d of %d packets were overtaken, want about a tenth", overtaken, len(got))
		}
	})

	t.Run("change under way", func(t *testing.T) {
		// Which delay they have is the question here, and how exactly that of "delay".
		const tries, exact = 3, 20 * time.Millisecond
		for try := 1; ; try++ {
			there, back := changeUnderWay(t, link, forth, home)
			if there >= longWay && there <= longWay+exact && back <= exact {
				return
			}
			if try == tries {
				t.Fatalf("packets arrived after %v there and %v back, want %v and none", there, back, longWay)
			}
		}
	})

	// Faults that lab makes are faults of this link too.
	t.Run("down", func(t *testing.T) {
		n.Cut()
		before, _ := link.Counts()
		home.t, forth.t = t, t
		if _, err := forth.out.Write(make([]byte, payload)); err == nil {
			t.Error("a packet leaves by a device that is down")
		}
		home.send(5, 0)
		lab.Eventually(t, 5*time.Second, func() error {
			if _, c := link.Counts(); c.Refused != 5 {
				return fmt.Errorf("%d packets are refused, want 5", c.Refused)
			}
			return nil
		})
		n.Mend()
		forth.send(5, 0)
		forth.arrived(there(link), before)
		if after, _ := link.Counts(); after.Passed != before.Passed+5 {
			t.Errorf("%d packets pass after the return, want 5", after.Passed-before.Passed)
		}
	})

	t.Run("idle", func(t *testing.T) {
		before := link.CPU()
		lab.Wait(time.Second)
		if used := link.CPU() - before; used > time.Millisecond {
			t.Errorf("an idle link uses %v of a second", used)
		}
	})
	for i, c := range func() []Counts { a, b := link.Counts(); return []Counts{a, b} }() {
		if c.Missed > 0 {
			t.Errorf("way %d has missed %d packets", i, c.Missed)
		}
	}
}

// longWay is long enough to change what is behind it.
const longWay = 3 * time.Second

// changeUnderWay sends packets one way, takes its delay away while they travel, and
// sends others back: how long half of each took. They keep the delay that was set
// when they entered.
func changeUnderWay(t *testing.T, link *Link, forth, home *probe) (took, tookBack time.Duration) {
	t.Helper()
	const n = 10
	link.Set(Way{Delay: longWay}, Way{})
	before, beforeBack := link.Counts()
	forth.send(n, 0)
	lab.Eventually(t, longWay-100*time.Millisecond, func() error {
		if c, _ := link.Counts(); c.Waiting != n {
			return fmt.Errorf("%d packets are under way, want %d", c.Waiting, n)
		}
		return nil
	})
	link.Set(Way{}, Way{})
	home.send(n, 0)
	got, gotBack := forth.arrived(there(link), before), home.arrived(back(link), beforeBack)
	if len(got) != n || len(gotBack) != n {
		t.Fatalf("%d packets arrived there and %d back, want %d", len(got), len(gotBack), n)
	}
	return quantile(got, 0.5), quantile(gotBack, 0.5)
}

// checkDelay sends packets one way. A machine that wakes its foremost threads late
// wakes the link's late too, and that is no delay of the link's: what the sender's
// waits were too long at that time is allowed for. Where the test itself is held up
// between the clock and the socket it tries again.
func checkDelay(t *testing.T, p *probe, way func() Counts, want time.Duration) {
	t.Helper()
	const n, tries = 300, 5
	var p5, p95, late time.Duration
	for range tries {
		before := way()
		p.send(n, time.Millisecond)
		got := p.arrived(way, before)
		if len(got) != n {
			t.Fatalf("%d of %d packets arrived", len(got), n)
		}
		p5, p95, late = quantile(got, 0.05), quantile(got, 0.95), quantileOf(p.late, 0.95)
		t.Logf("delay %v: %v, %v, %v (5 %%, half, 95 %%), where the sender woke up to %v late (95 %%)", want, p5, quantile(got, 0.5), p95, late)
		if p5 >= want && p95 <= want+late+time.Millisecond {
			return
		}
	}
	t.Errorf("delay %v: 5 %% take up to %v, 95 %% up to %v, want at most 1 ms more than was set and %v", want, p5, p95, late)
}

// checkRate sends twice what the first way carries, and tries again as
// checkDelay does.
func checkRate(t *testing.T, link *Link, p *probe, rate float64) {
	t.Helper()
	const tries, wait = 3, 200 * time.Millisecond
	link.Set(Way{Rate: rate, Queue: int(rate / 8 * wait.Seconds())}, Way{})
	each := time.Duration((payload + headers) * 8e9 / rate / 2)
	count := int(2 * time.Second / each)
	var carried float64
	var waited time.Duration
	for range tries {
		before, _ := link.Counts()
		p.send(count, each)
		got := p.arrived(there(link), before)
		after, _ := link.Counts()
		dropped := int(after.QueueFull - before.QueueFull)
		if len(got)+dropped != count || dropped == 0 {
			t.Fatalf("%d packets arrived and %d were dropped, of %d", len(got), dropped, count)
		}
		carried, waited = rateOf(got), quantile(got[len(got)/2:], 0.5)
		t.Logf("%.2f Mbit/s and a wait of %v, where %.0f and %v were set", carried/1e6, waited, rate/1e6, wait)
		if math.Abs(carried/rate-1) <= 0.03 && (waited-wait).Abs() <= wait/30 {
			return
		}
	}
	t.Errorf("%.2f Mbit/s are carried and packets wait for %v, want %.0f and %v", carried/1e6, waited, rate/1e6, wait)
}

// rateOf is how many bits a second arrived, in the middle one of many short
// times: where the test was held up for long the queue ran empty.
func rateOf(got []arrival) float64 {
	const n = 100
	var rates []float64
	for i := n; i < len(got); i += n {
		rates = append(rates, n*(payload+headers)*8/got[i].at.Sub(got[i-n].at).Seconds())
	}
	slices.Sort(rates)
	return rates[len(rates)/2]
}

// Carry is one TCP connection's bulk over a link of 100 ms round trip.
func BenchmarkCarry(b *testing.B) {
	lab.Require(b)
	for _, rate := range []float64{100e6, 400e6, 1000e6} {
		b.Run(fmt.Sprintf("%.0fMbit", rate/1e6), func(b *testing.B) {
			n, link := TwoSites(b, lab.Options{}, Way{Delay: 50 * time.Millisecond, Rate: rate})
			for _, s := range n.Sites { // windows for what the link can carry
				if _, err := s.Gateway.Run("sysctl", "-w", "net.ipv4.tcp_wmem=4096 16384 134217728", "net.ipv4.tcp_rmem=4096 131072 134217728"); err != nil {
					b.Fatal(err)
				}
			}
			carry(b, n, link)
		})
	}
}

func carry(b *testing.B, n *lab.Network, link *Link) {
	b.Helper()
	addr := netip.AddrPortFrom(n.Sites[1].WAN, port).String()
	ln, err := n.Sites[1].Gateway.Listen(addr)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		buf := make([]byte, 1<<20)
		for err == nil {
			_, err = c.Read(buf)
		}
		_ = c.Close()
	})
	c, err := n.Sites[0].Gateway.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	warm, measured := 2*time.Second, 2*time.Second
	if testing.Short() {
		warm, measured = 200*time.Millisecond, 200*time.Millisecond
	}
	buf := make([]byte, 1<<20)
	send := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); {
			if _, err := c.Write(buf); err != nil && !errors.Is(err, io.EOF) {
				b.Fatal(err)
			}
		}
	}
	send(warm)
	var bits, cpu, packets float64
	for b.Loop() {
		before, beforeBack := link.Counts()
		used, began := link.CPU(), time.Now()
		send(measured)
		after, afterBack := link.Counts()
		bits += float64(after.PassedBytes-before.PassedBytes) * 8 / time.Since(began).Seconds()
		cpu += (link.CPU() - used).Seconds()
		packets += float64(after.Passed - before.Passed + afterBack.Passed - beforeBack.Passed)
	}
	b.ReportMetric(bits/float64(b.N)/1e6, "Mbit/s")
	b.ReportMetric(cpu/packets*1e6, "µs/packet")
	b.ReportMetric(100*cpu/(measured.Seconds()*float64(b.N)), "%core")
	_ = c.Close()
	_ = ln.Close()
	wg.Wait()
	if there, back := link.Counts(); there.Missed+back.Missed > 0 {
		b.Errorf("the link has missed packets: %+v %+v", there, back)
	}
}
