package interop

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	sidecars "culvert/sidecar"
	"culvert/test/lab"
)

// dc1 has an unmodified Consul server behind a sidecar, and dc2 one with Consul's
// own WAN federation via mesh gateways, which has no sidecar: Culvert's gateways are
// its mesh gateways, and the far sidecar speaks to its RPC port.
func TestMixed(t *testing.T)        { require(t); testMixed(t, nil, nil) }
func TestMixedHAProxy(t *testing.T) { require(t); testMixed(t, startHAProxy, startNginx) }

// testMixed has culvert's gateways where no others are given.
func testMixed(t *testing.T, gateway1, gateway2 func(t *testing.T, h *lab.Host, config string)) {
	n := lab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1})
	n.DefaultRoutes()
	guard, tap := n.Guard(), n.Tap()
	pki := lab.NewPKI(t, "consul")
	dc1, dc2 := n.Sites[0], n.Sites[1]
	alice, bob := dc1.Hosts[0], dc2.Hosts[0]
	if gateway1 == nil {
		gw := func(here, there *lab.Site, node, address string) {
			here.Gateway.StartCulvert("gateway", fmt.Sprintf(`datacenter = %q
node = "gw1"
listen { address = "0.0.0.0:8443" }
sidecar %q { address = %q }
datacenter %q { gateways = [%q] }
`, here.Name, node, address, there.Name, lab.HostPort(there.WAN, 8443)))
		}
		gw(dc1, dc2, "alice", lab.HostPort(alice.Addr, 8443))
		gw(dc2, dc1, "bob", lab.HostPort(bob.Addr, 8300))
	} else {
		f := &federation{t: t, Network: n, servers: []*server{
			{Node: "alice", Site: "dc1", Kind: consulKind, Host: alice, at: 0},
			{Node: "bob", Site: "dc2", Kind: kind{Profile: "consul", Domain: "consul", Port: 8300}, Host: bob, at: 1},
		}}
		gateway1(t, dc1.Gateway, f.routed(0, "haproxy.cfg"))
		gateway2(t, dc2.Gateway, f.routed(1, "nginx.conf"))
	}
	sidecar := alice.StartCulvert("sidecar", fmt.Sprintf(`datacenter = "dc1"
node = "alice"
capture = "redirect"
server {
  profile = "consul"
  address = %q
}
listen { address = %q }
gateways = [%q]
peer "bob" {
  datacenter = "dc2"
  advertise  = %q
}
log { level = "debug" }
%s`, alice.Addr, lab.HostPort(alice.Addr, 8443), lab.HostPort(dc1.Gateway.Addr, 8443), bob.Addr, pki.Server("dc1", "alice", "consul")))

	a := alice.StartConsul(lab.ConsulOptions{Datacenter: "dc1", Node: "alice", Encrypt: gossipKey, Expect: 1})
	b := bob.StartConsul(lab.ConsulOptions{
		Datacenter: "dc2", Node: "bob", Encrypt: gossipKey, Expect: 1, TLS: pki.Files("dc2", "bob", "consul"),
		Primary: "dc1", PrimaryGateways: []netip.AddrPort{netip.AddrPortFrom(dc2.Gateway.Addr, 8443)},
	})
	m := &mixed{t, [2]*lab.Consul{a, b}}
	m.seeEachOther()
	m.calls()
	m.subscriptions()
	wantNative(t, sidecar)
	if gateway1 == nil {
		m.registerGateway(dc2)
	}

	// What the two send each other arrives, in both directions: neither suspects
	// the other for as long as several probes take.
	lab.Wait(20 * time.Second)
	m.seeEachOther()
	for _, c := range m.agents {
		if out := c.Output(); strings.Contains(out, "Suspect") || strings.Contains(out, "EventMemberFailed") {
			t.Errorf("%s has suspected the other", c.Node)
		}
	}
	wantNative(t, sidecar)
	passed, dropped := guard.Counts()
	if passed == 0 || dropped != 0 || n.SentPlainly() != 0 {
		t.Errorf("on the WAN link %d packets passed and %d were dropped; %d left plainly", passed, dropped, n.SentPlainly())
	}
	// A handshake, or the alert by which a native server refuses a session.
	tap.Check(t, 0x16, 0x15)
}

// A mixed is an unmodified server and a native one.
type mixed struct {
	t      *testing.T
	agents [2]*lab.Consul
}

func (m *mixed) seeEachOther() {
	m.t.Helper()
	took := all(m.t, settle, m.agents[:], func(c *lab.Consul) error {
		members, err := c.WANMembers()
		if err == nil && (len(members) != 2 || members["alice.dc1"].Status != "alive" || members["bob.dc2"].Status != "alive") {
			err = fmt.Errorf("%s sees %v", c.Node, members)
		}
		return err
	})
	m.t.Logf("both see both after %v", took.Round(time.Millisecond))
}

// calls makes RPC calls both ways.
func (m *mixed) calls() {
	m.t.Helper()
	for i, from := range m.agents {
		dc := m.agents[1-i].Datacenter
		for _, command := range []struct{ args, want string }{
			{"kv put -datacenter=" + dc + " told/by " + from.Node, "Success"},
			{"kv get -datacenter=" + dc + " told/by", from.Node},
			{"catalog services -datacenter=" + dc, "consul"},
			{"snapshot save -datacenter=" + dc + " other.snap", "Saved and verified snapshot"},
		} {
			lab.Eventually(m.t, settle, func() error {
				out, err := from.Do(strings.Fields(command.args)...)
				if err == nil && !strings.Contains(out, command.want) {
					err = fmt.Errorf("%s printed %q", command.args, out)
				}
				return err
			})
		}
		if out, err := m.agents[1-i].Do("kv", "get", "told/by"); err != nil || strings.TrimSpace(out) != from.Node {
			m.t.Errorf("at the other end kv get told %q, %v", out, err)
		}
		m.t.Logf("%s has read, written and saved a snapshot of %s", from.Node, dc)
	}
}

// subscriptions asks across for a service, which travels by gRPC, and learns of a
// change.
func (m *mixed) subscriptions() {
	m.t.Helper()
	for i, from := range m.agents {
		to := m.agents[1-i]
		path := "/v1/health/service/consul?cached&dc=" + to.Datacenter
		lab.Eventually(m.t, settle, func() error {
			var nodes []struct{ Node struct{ Node string } }
			_, err := from.Call("GET", path, nil, &nodes)
			if err == nil && (len(nodes) != 1 || nodes[0].Node.Node != to.Node) {
				err = fmt.Errorf("healthy servers of %s seen from %s: %v", to.Datacenter, from.Node, nodes)
			}
			return err
		})
	}
}

// registerGateway tells the native server's catalog of Culvert's gateway, as of a
// mesh gateway: from then on it is in dc2's federation state, and the server uses
// it for whatever is not the primary.
func (m *mixed) registerGateway(site *lab.Site) {
	m.t.Helper()
	bob := m.agents[1]
	address := func(a netip.Addr) map[string]any { return map[string]any{"Address": a.String(), "Port": 8443} }
	if _, err := bob.Call("PUT", "/v1/agent/service/register", map[string]any{
		"Name": "mesh-gateway", "Kind": "mesh-gateway", "Address": site.Gateway.Addr.String(), "Port": 8443,
		"Meta":            map[string]string{"consul-wan-federation": "1"},
		"TaggedAddresses": map[string]any{"lan": address(site.Gateway.Addr), "wan": address(site.WAN)},
	}, nil); err != nil {
		m.t.Fatal(err)
	}
	lab.Eventually(m.t, settle, func() error {
		var gateways map[string][]struct{ Service struct{ Address string } }
		if _, err := bob.Call("GET", "/v1/internal/federation-states/mesh-gateways", nil, &gateways); err != nil {
			return err
		}
		if len(gateways["dc2"]) != 1 || gateways["dc2"][0].Service.Address != site.Gateway.Addr.String() {
			return fmt.Errorf("dc2's gateways: %v", gateways)
		}
		return nil
	})
	m.calls()
}

// wantNative checks that the sidecar speaks Consul's protocol to the native
// server, that packets go both ways, and that streams went both ways too.
func wantNative(t *testing.T, sidecar *lab.Daemon) {
	t.Helper()
	status := sidecar.Status()
	i := slices.IndexFunc(status.Peers, func(p sidecars.PeerStatus) bool { return p.Node == "bob" })
	if i < 0 {
		t.Fatalf("bob is not in the status: %+v", status)
	}
	p := status.Peers[i]
	if p.Path != "native" || p.State != "up" || p.PacketsSent == 0 || p.PacketsReceived == 0 {
		t.Errorf("bob in the status: %+v", p)
	}
	for _, labels := range [][]string{
		{"direction", "in", "service", "gossip-stream"}, {"direction", "in", "service", "rpc"}, {"direction", "out", "service", "rpc"},
	} {
		if n := sidecar.Metrics().Sum("culvert_stream_connections_total", labels...); n == 0 {
			t.Errorf("no stream of %v", labels)
		}
	}
}
