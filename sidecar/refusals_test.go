package sidecar

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/internal/alert"
	"culvert/internal/pipe"
	"culvert/sniff"
)

// A testGateway is a gateway of alice's, which either has no route or leads to bob. It
// counts the connections of the service rpc.
type testGateway struct {
	*net.TCPListener
	rpc   atomic.Int64
	serve func(c *sniff.Conn)
	ready chan struct{} // closed when serve is known
}

// use tells what becomes of connections, those that wait for it included.
func (g *testGateway) use(serve func(c *sniff.Conn)) {
	g.serve = serve
	close(g.ready)
}

func newTestGateway(t *testing.T, at netip.Addr) *testGateway {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 8443)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	g := &testGateway{TCPListener: ln, ready: make(chan struct{})}
	go func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				c := sniff.NewConn(raw, nil)
				hello, err := c.Hello()
				if err != nil { // a probe of the gateway's health, or the end
					_ = raw.Close()
					return
				}
				if slices.Contains(hello.Protocols, "culvert/stream/1/rpc") {
					g.rpc.Add(1)
				}
				select {
				case <-g.ready:
					g.serve(c)
				case <-t.Context().Done():
					_ = raw.Close()
				}
			}()
		}
	}()
	return g
}

// leadTo passes a connection on as a gateway does.
func leadTo(address string) func(c *sniff.Conn) {
	return func(c *sniff.Conn) {
		near, peeked := c.Detach()
		far, err := net.Dial("tcp4", address)
		if err != nil {
			pipe.Abort(near)
			return
		}
		_, _ = far.Write(peeked)
		pipe.Join(near, far, pipe.Options{})
	}
}

func withoutRoute(c *sniff.Conn) { alert.Refuse(c, alert.UnrecognizedName) }

// behindGateways is alice, who reaches bob through two gateways. They are there
// before she is: what she dials at her start finds them.
func behindGateways(t *testing.T) (c *consul, gateways [2]*testGateway, addrs [2]netip.Addr) {
	t.Helper()
	c = newConsul(t, func(cfg *config.Sidecar) {
		for i := range addrs {
			addrs[i] = cfg.Server.Address.Next()
			for range i + 1 {
				addrs[i] = addrs[i].Next()
			}
			gateways[i] = newTestGateway(t, addrs[i])
			cfg.Gateways = append(cfg.Gateways, netip.AddrPortFrom(addrs[i], 8443).String())
		}
		cfg.Datacenters[0].Mode = string(catalog.ModeLocal)
	})
	return c, gateways, addrs
}

// avoided are the gateways that are avoided for bob.
func (c *consul) avoided(t *testing.T) (gateways []string) {
	t.Helper()
	e, err := c.alice.locator.Explain(catalog.Key{Datacenter: "dc2", Node: "bob"})
	if err != nil {
		t.Fatal(err)
	}
	for _, candidate := range e.Candidates {
		if !candidate.AvoidedUntil.IsZero() {
			gateways = append(gateways, candidate.Address)
		}
	}
	return gateways
}

// A peer that refuses a protocol does so whichever way it is asked: it is asked
// once, and no gateway is avoided for it.
func TestARefusalIsNoFaultOfTheGateway(t *testing.T) {
	c, gateways, _ := behindGateways(t)
	got := c.native(t)
	bob := c.addr(2, 200).String() + ":8443"
	gw1, gw2 := gateways[0], gateways[1]
	gw1.use(leadTo(bob))
	gw2.use(leadTo(bob))
	if _, err := c.call(t, "\x03hello"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("TLS inside: %v, want a reset", err)
	}
	if n := gw1.rpc.Load() + gw2.rpc.Load(); n != 1 {
		t.Errorf("bob was dialled %d times, want once", n)
	}
	if avoided := c.avoided(t); len(avoided) > 0 {
		t.Errorf("%q are avoided", avoided)
	}
	if answer, err := c.call(t, "\x04question"); err != nil || answer != "answer" {
		t.Errorf("answered %q, %v", answer, err)
	}
	if arrived := <-got; arrived != "consul/rpc-multi question" {
		t.Errorf("%q arrived", arrived)
	}
}

// A gateway that has no route says so, and the other one is asked.
func TestAGatewayWithoutARouteIsPassedOver(t *testing.T) {
	c, gateways, addrs := behindGateways(t)
	got := c.native(t)
	none := gateways[0]
	none.use(withoutRoute)
	gateways[1].use(leadTo(c.addr(2, 200).String() + ":8443"))
	for none.rpc.Load() == 0 {
		if answer, err := c.call(t, "\x04question"); err != nil || answer != "answer" {
			t.Fatalf("answered %q, %v", answer, err)
		}
		<-got
		if len(c.avoided(t)) > 0 { // found by a packet's dial
			break
		}
	}
	if avoided := c.avoided(t); len(avoided) != 1 || !strings.HasPrefix(avoided[0], addrs[0].String()) {
		t.Errorf("%q are avoided, want the one without a route", avoided)
	}
}

// A gateway that cannot go on resets, and who reads of that is told where to look.
func TestAResetPointsToTheGateway(t *testing.T) {
	c, gateways, _ := behindGateways(t)
	for _, gw := range gateways {
		gw.use(leadTo("127.0.0.1:1")) // nobody is there
	}
	if _, err := c.call(t, "\x04question"); err == nil {
		t.Error("answered, by nobody")
	}
	last := c.alice.outbound.Peer(keyOf(certs.Identity{Datacenter: "dc2", Node: "bob"})).LastError
	if !strings.Contains(last, "whose own status tells") || !strings.Contains(last, ":8443") {
		t.Errorf("the last error is %q", last)
	}
}
