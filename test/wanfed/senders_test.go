package wanfed

import (
	"fmt"
	"testing"
)

// A packet's sender is the node that its certificate names, whatever the packet
// says. Consul's server takes packets of any server's certificate (rpc.go,
// handleALPN_WANGossipPacketStream, looks at no name); here they need one whose
// address is known, to come from there.
func TestSenders(t *testing.T) {
	w := newWorld(t, consulPKI(t))
	alice := w.newSink()
	w.startGateways(1, 2)
	w.startSidecar(2)
	for i, c := range []struct {
		name   string
		cert   cert
		reason string // for which the packets are dropped; "" delivers them
	}{
		{"named", w.pki.native("dc2", "betty"), ""},
		{"not of the catalog", w.pki.native("dc2", "bill"), "unknown_peer"},
		{"any server", w.pki.named("server.dc2.consul"), "no_node"},
		{"wildcard", w.pki.named("*.server.dc2.consul", "server.dc2.consul"), "no_node"},
		{"named again", w.pki.native("dc2", "betty"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			host := *w
			host.t = t
			from := host.bareTransport(2, c.cert)
			before, drops := len(alice.packets()), w.drops(c.reason)
			if _, err := from.WriteToAddress(fmt.Appendf(nil, "packet %d", i), w.aliceAt()); err != nil {
				t.Fatal(err)
			}
			if c.reason == "" {
				got, at := alice.next(t, before), alice.from(before)
				if got != fmt.Sprintf("packet %d", i) || at != w.at(2, 1, gossipPort) {
					t.Errorf("%q came from %s", got, at)
				}
				return
			}
			eventually(t, func() error {
				if n := w.drops(c.reason) - drops; n != 1 {
					return fmt.Errorf("%v drops are counted as %s", n, c.reason)
				}
				return nil
			})
			if len(alice.packets()) > before {
				t.Error("it was delivered")
			}
		})
	}
}

// drops is how many of the packets that came to alice were dropped for a reason.
func (w *world) drops(reason string) float64 {
	w.t.Helper()
	return w.sidecar.metric("culvert_packet_drops_total", `direction="in"`, fmt.Sprintf("reason=%q", reason))
}
