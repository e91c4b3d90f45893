package wanfed

import (
	"io"
	"log"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/hashicorp/consul/agent/consul/wanfed"
)

// A silenceCase is a pair of sidecars, and Consul's transport beside it, with the same
// silence between two packets.
type silenceCase struct {
	silence time.Duration
	ours    *sidecarPair
	sender  *wanfed.Transport
	to      memberlist.Address
	server  *server
	came    atomic.Int64 // by Consul's transport

	before [2]int64 // what had come before the last packet: by wanfed, by culvert
}

func newSilenceCase(w *world, first int, silence time.Duration) *silenceCase {
	w.t.Helper()
	c := &silenceCase{silence: silence, ours: newSidecarPair(w, first)}
	near, far := first+2, first+3
	receiver := w.directTransport(far, "")
	c.server = newServer(w.t, dcName(far), w.at(far, 11, rpcPort), configurator(w.t, w.pki.native(dcName(far), "betty")), func(s *server) { s.wan = receiver })
	c.sender = w.directTransport(near, w.at(far, 11, rpcPort))
	c.to = memberlist.Address{Name: "betty." + dcName(far), Addr: w.at(far, 11, rpcPort)}
	done := make(chan struct{})
	w.t.Cleanup(func() { close(done) })
	go func() {
		for {
			select {
			case <-receiver.PacketCh():
				c.came.Add(1)
			case <-done:
				return
			}
		}
	}()
	return c
}

// directTransport is Consul's, for the server betty of a site. Whatever it sends
// goes to one address.
func (w *world) directTransport(site int, to string) *wanfed.Transport {
	w.t.Helper()
	plain, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{w.addr(site, 11)}, BindPort: gossipPort, Logger: log.New(io.Discard, "", 0),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	cfg := configurator(w.t, w.pki.native(dcName(site), "betty"))
	t, err := wanfed.NewTransport(cfg, plain, dcName(site), func(string) string { return to })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = t.Shutdown() })
	return t
}

// send sends one packet each way of carrying it.
func (c *silenceCase) send() {
	c.before = [2]int64{c.came.Load(), c.ours.received[1].Load()}
	packet := make([]byte, payload)
	packet[0] = counted
	_, _ = c.sender.WriteToAddress(packet, c.to) // an error shows as well
	if _, err := c.ours.udp[0].WriteToUDPAddrPort(packet, c.ours.to[0]); err != nil {
		c.ours.t.Fatal(err)
	}
}

// arrived waits for that packet and tells by which way it came.
func (c *silenceCase) arrived() (byWanfed, byOurs bool) {
	for limit := time.Now().Add(3 * time.Second); time.Now().Before(limit) && !(byWanfed && byOurs); time.Sleep(10 * time.Millisecond) {
		byWanfed = c.came.Load() > c.before[0]
		byOurs = c.ours.received[1].Load() > c.before[1]
	}
	return byWanfed, byOurs
}

// restart restarts the far ends: the sidecar, and for Consul's transport the server,
// whose connections end with it.
func (c *silenceCase) restart(first int) {
	c.ours.daemons[1].Stop()
	c.ours.daemons[1] = c.ours.start(first+1, first)
	c.server.hangUp()
}

// BenchmarkSilence shows what becomes of the first packet after a silence, and of the
// first after the far end was restarted. It takes a little over two minutes.
func BenchmarkSilence(b *testing.B) {
	w := newWorld(b, consulPKI(b))
	var cases []*silenceCase
	for i, silence := range []time.Duration{0, 115 * time.Second, 121 * time.Second, 125 * time.Second} {
		cases = append(cases, newSilenceCase(w, 10*(i+1), silence))
	}
	for b.Loop() {
		for _, c := range cases {
			c.send()
			if byWanfed, byOurs := c.arrived(); !byWanfed || !byOurs {
				b.Fatalf("before any silence: by wanfed %v, by culvert %v", byWanfed, byOurs)
			}
		}
		began := time.Now()
		cases[0].restart(10)
		for _, c := range cases {
			time.Sleep(time.Until(began.Add(c.silence)))
			c.send()
			byWanfed, byOurs := c.arrived()
			what := "after a restart of the far end"
			if c.silence > 0 {
				what = "after " + c.silence.String() + " of silence"
			}
			b.Logf("%-32s by wanfed: %-5v  by culvert: %v", what, byWanfed, byOurs)
			if !byOurs {
				b.Error("that is a packet lost")
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}
