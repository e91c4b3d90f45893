package link

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"culvert/test/lab"
	"culvert/test/netlab"
)

const (
	gossipPort = 7946 // of the profile's services
	bulkPort   = 7000 // of a stream service of the operator's own
)

// A plan is what a world is made of.
type plan struct {
	hosts      [2]int
	way        netlab.Way // both ways
	congestion string     // control of all TCP connections, on all hosts
	bare       bool       // without sidecars and gateways
}

// A world is two datacenters with an emulated link between them: servers'
// hosts that reach each other through sidecars and gateways, and plainly too.
type world struct {
	*lab.Network
	tb       testing.TB
	link     *netlab.Link
	servers  []*server
	gateways [2]*lab.Daemon
	pki      *lab.PKI
}

// A server is a host for one, with its sidecar.
type server struct {
	dc, node string
	host     *lab.Host
	virtual  netip.Addr // that it advertises
	sidecar  *lab.Daemon
}

func newWorld(tb testing.TB, p plan) *world {
	tb.Helper()
	w := &world{tb: tb}
	w.Network, w.link = netlab.TwoSites(tb, lab.Options{HostsA: p.hosts[0], HostsB: p.hosts[1]}, p.way)
	w.Route()
	allow(tb, p.congestion)
	for d, site := range w.Sites {
		for _, h := range append([]*lab.Host{site.Gateway}, site.Hosts...) {
			if _, err := h.Run("sysctl", "-w", "net.ipv4.tcp_congestion_control="+p.congestion); err != nil {
				tb.Fatal(err)
			}
		}
		for i, h := range site.Hosts {
			w.servers = append(w.servers, &server{
				dc: site.Name, node: fmt.Sprintf("%s-%d", site.Name, i+1), host: h,
				virtual: netip.AddrFrom4([4]byte{127, 77, byte(d + 1), byte(i + 1)}),
			})
		}
	}
	if p.bare {
		return w
	}
	w.pki = lab.NewPKI(tb, "consul")
	for d, site := range w.Sites {
		w.gateways[d] = site.Gateway.StartCulvert("gateway", w.gatewayConfig(d))
	}
	for _, s := range w.servers {
		s.sidecar = s.host.StartCulvert("sidecar", w.sidecarConfig(s))
	}
	return w
}

func (w *world) gatewayConfig(d int) string {
	site, other := w.Sites[d], w.Sites[1-d]
	var b strings.Builder
	fmt.Fprintf(&b, "datacenter = %q\nnode = \"gw\"\nlisten { address = \"0.0.0.0:8443\" }\n", site.Name)
	for _, s := range w.servers {
		if s.dc == site.Name {
			fmt.Fprintf(&b, "sidecar %q { address = %q }\n", s.node, lab.HostPort(s.host.Addr, 8443))
		}
	}
	fmt.Fprintf(&b, "datacenter %q { gateways = [%q] }\n", other.Name, lab.HostPort(other.WAN, 8443))
	return b.String()
}

func (w *world) sidecarConfig(s *server) string {
	gateway := w.Sites[0].Gateway
	if s.dc == w.Sites[1].Name {
		gateway = w.Sites[1].Gateway
	}
	var b strings.Builder
	fmt.Fprintf(&b, `datacenter = %q
node = %q
server {
  profile = "memberlist"
  address = %q
  advertise = %q
}
service "bulk" {
  kind = "stream"
  port = %d
}
listen { address = %q }
gateways = [%q]
%s`, s.dc, s.node, s.host.Addr, s.virtual, bulkPort, lab.HostPort(s.host.Addr, 8443),
		lab.HostPort(gateway.Addr, 8443), w.pki.Server(s.dc, s.node, "consul"))
	for _, peer := range w.servers {
		if peer == s {
			continue
		}
		fmt.Fprintf(&b, "peer %q {\n  datacenter = %q\n  advertise = %q\n", peer.node, peer.dc, peer.virtual)
		if peer.dc == s.dc {
			fmt.Fprintf(&b, "  address = %q\n", lab.HostPort(peer.host.Addr, 8443))
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// restart starts the sidecars anew, so that none has a connection to another.
func (w *world) restart() {
	w.tb.Helper()
	for _, s := range w.servers {
		s.sidecar.Stop()
		s.sidecar.Again()
	}
	for _, s := range w.servers {
		s.sidecar.AwaitReady()
	}
}

// allow lets namespaces have a congestion control, until the test ends: what is
// not the machine's default is its own network's alone.
func allow(tb testing.TB, congestion string) {
	tb.Helper()
	const allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	before, err := os.ReadFile(allowed)
	if err != nil {
		tb.Fatal(err)
	}
	if slices.Contains(strings.Fields(string(before)), congestion) {
		return
	}
	if err := os.WriteFile(allowed, append(bytes.TrimSpace(before), " "+congestion...), 0o644); err != nil {
		tb.Fatalf("allow %s: %v", congestion, err)
	}
	tb.Cleanup(func() {
		if err := os.WriteFile(allowed, before, 0o644); err != nil {
			tb.Error(err)
		}
	})
}

// check fails the test where the link has done what it was not set to.
func (w *world) check() {
	w.tb.Helper()
	there, back := w.link.Counts()
	if n := there.Missed + back.Missed; n > 0 {
		w.tb.Errorf("the link could not keep up: it has missed %d packets", n)
	}
}
