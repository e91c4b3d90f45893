package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"culvert/test/lab"
	"culvert/test/netlab"
)

const linger = 3 * time.Second // for packets that are late

// lengths are how long a stream goes on before packets are measured beside it, until
// it has found its rate, and how long they are. In short they are what shows that
// all of it works.
func lengths() (settle, measure time.Duration) {
	if testing.Short() {
		return 200 * time.Millisecond, time.Second
	}
	return 2 * time.Second, 4 * time.Second
}

// PacketsBesideStream is how long packets take, one way, while a stream to the
// same peer takes all that the link can carry: through sidecars, and on two
// plain TCP connections, of which one carries packets in frames. That one stays open
// as the sidecars' does: BBR, having seen no shorter round trip for 10 s, has but four
// segments on their way for a fifth of a second, which a new connection never sees.
func BenchmarkPacketsBesideStream(b *testing.B) {
	require(b)
	const roundTrip, rate = 50 * time.Millisecond, 100e6
	for _, congestion := range congestions {
		b.Run(congestion, func(b *testing.B) {
			way := netlab.Way{Delay: roundTrip / 2, Rate: rate, Queue: int(rate / 8 * roundTrip.Seconds())}
			w := newWorld(b, plan{hosts: [2]int{1, 1}, way: way, congestion: congestion})
			near, far := w.servers[0], w.servers[1]
			client, server := respond(b, near), respond(b, far)
			warm(b, client, far)
			kinds := []contest{
				{"two plain TCP connections", lab.HostPort(far.host.Addr, bulkPort), framesTo(b, near, far), nil},
				{"ours, stream of a service of its own", lab.HostPort(far.virtual, bulkPort), packetsTo(client, far), nil},
				{"ours, gossip-stream", lab.HostPort(far.virtual, gossipPort), packetsTo(client, far), nil},
			}
			for b.Loop() {
				for i := range kinds {
					kinds[i].round(b, near, server)
				}
			}
			w.check()
			b.ReportMetric(0, "ns/op")
			plain := kinds[0].p99()
			for i, k := range kinds {
				b.ReportMetric(k.p99(), []string{"plain-p99-ms", "ours-p99-ms", "ours-gossip-p99-ms"}[i])
				row := []string{congestion, k.name}
				for _, f := range []func(outcome) float64{
					func(o outcome) float64 { return ms(o.p50) },
					func(o outcome) float64 { return ms(o.p99) },
					func(o outcome) float64 { return 100 * o.come },
					func(o outcome) float64 { return o.rate },
				} {
					row = append(row, fmt.Sprintf("%.1f", k.median(f)))
				}
				tables.add(fmt.Sprintf("Packets beside a saturating stream, one way, %.0f Mbit/s, %v round trip, medians of %d", rate/1e6, roundTrip, len(k.rounds)),
					[]string{"", "", "p50 ms", "p99 ms", "% come", "stream Mbit/s", "p99 ratio"}, append(row, fmt.Sprintf("%.2f", k.p99()/plain)))
			}
			b.ReportMetric(kinds[1].p99()/plain, "ours/plain")
		})
	}
}

// A contest is one way to carry a stream and packets.
type contest struct {
	name   string
	stream string             // where the stream goes
	send   func([]byte) error // how packets go
	rounds []outcome
}

// An outcome is that of one round.
type outcome struct {
	spread
	rate float64 // of the stream, Mbit/s
}

func (c *contest) median(f func(outcome) float64) float64 {
	var v []float64
	for _, o := range c.rounds {
		v = append(v, f(o))
	}
	return median(v)
}

func (c *contest) p99() float64 { return c.median(func(o outcome) float64 { return ms(o.p99) }) }

// round runs the stream and sends packets beside it.
func (c *contest) round(b *testing.B, near *server, server *responder) {
	b.Helper()
	stream, err := request(near.host, c.stream, sinkRequest)
	if err != nil {
		b.Fatalf("%s: %v", c.name, err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 256<<10)
		for {
			if _, err := stream.Write(buf); err != nil {
				if !errors.Is(err, net.ErrClosed) {
					b.Errorf("%s: the stream: %v", c.name, err)
				}
				return
			}
		}
	})
	settle, measure := lengths()
	lab.Wait(settle)
	server.packets.reset()
	began, before := time.Now(), server.sunk.Load()
	tick := time.NewTicker(packetEvery)
	packet := make([]byte, packetSize)
	for time.Since(began) < measure {
		<-tick.C
		server.packets.stamp(packet)
		if err := c.send(packet); err != nil {
			b.Fatalf("%s: send a packet: %v", c.name, err)
		}
	}
	tick.Stop()
	rate := float64(server.sunk.Load()-before) * 8 / time.Since(began).Seconds() / 1e6
	for end := time.Now().Add(linger); !server.packets.all() && time.Now().Before(end); {
		lab.Wait(10 * time.Millisecond)
	}
	c.rounds = append(c.rounds, outcome{server.packets.spread(), rate})
	reset(stream)
	wg.Wait()
	drain(b, server)
}

// reset ends a connection at once, with what waits in it.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// drain waits until nothing arrives any more of the round that has ended.
func drain(b *testing.B, server *responder) {
	b.Helper()
	last := int64(-1)
	lab.Eventually(b, longest, func() error {
		lab.Wait(300 * time.Millisecond)
		now := server.sunk.Load()
		if now == last {
			return nil
		}
		last = now
		return errors.New("the last stream goes on")
	})
}

// packetsTo sends packets as a server does, from its port.
func packetsTo(from *responder, to *server) func([]byte) error {
	target := netipPort(to.virtual, gossipPort)
	return func(p []byte) error {
		_, err := from.udp.WriteToUDPAddrPort(p, target)
		return err
	}
}

// framesTo sends packets in frames on a plain connection, which is open until the
// benchmark ends.
func framesTo(b *testing.B, from, to *server) func([]byte) error {
	b.Helper()
	c, err := request(from.host, lab.HostPort(to.host.Addr, gossipPort), framesRequest)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { reset(c) })
	_ = c.SetDeadline(time.Time{})
	return func(p []byte) error {
		_ = c.SetWriteDeadline(time.Now().Add(longest))
		_, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(p))), p...))
		return err
	}
}
