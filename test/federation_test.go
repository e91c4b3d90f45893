package test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"culvert/test/lab"
)

// A server is one server of a federation: a host of the lab, an agent and its
// sidecar.
type server struct {
	test      *testing.T
	dc, node  string
	host      *lab.Host
	advertise netip.Addr
	agent     *lab.SerfAgent
	sidecar   *lab.Daemon
}

// A federation is a network with everything running on it.
type federation struct {
	*lab.Network
	t        *testing.T
	servers  []*server
	gateways [2]*lab.Daemon
	pki      *lab.PKI

	guard *lab.Guard // of what is watched, else nil
	tap   *lab.Tap
}

// settings vary a federation.
type settings struct {
	hosts      [2]int
	ipv6       bool
	agentJSON  string // further configuration of the agents
	noAgents   bool
	domain     string // "" means consul
	extra      string // further configuration of the sidecars
	noSidecars bool
	watched    bool // the WAN link is guarded and tapped, before sidecars connect
	redirect   bool // capture is redirect: servers have their real addresses and listen on all
}

// names are the servers' names, in the order of the hosts.
var names = []string{"alice", "amy", "bob", "ben"}

// newFederation builds the network, and starts gateways, sidecars and agents.
func newFederation(t *testing.T, s settings) *federation {
	t.Helper()
	if s.domain == "" {
		s.domain = "consul"
	}
	f := &federation{t: t, Network: lab.TwoSites(t, lab.Options{HostsA: s.hosts[0], HostsB: s.hosts[1], IPv6: s.ipv6})}
	f.pki = lab.NewPKI(t, s.domain)
	if s.redirect {
		f.DefaultRoutes()
	}
	i := 0
	for d, site := range f.Sites {
		for h, host := range site.Hosts {
			f.servers = append(f.servers, &server{test: t, dc: site.Name, node: names[i], host: host, advertise: virtual(s.ipv6, d+1, h+1)})
			switch {
			case s.redirect:
				f.servers[i].advertise = host.Addr
			case s.ipv6:
				host.MakeLocal("fd77::/32")
			}
			i++
		}
	}
	if s.watched {
		f.guard, f.tap = f.Guard(), f.Tap()
	}
	if !s.noSidecars {
		f.startCulvert(s)
	}
	if s.noAgents {
		return f
	}
	for _, one := range f.servers {
		if s.redirect {
			one.agent = one.host.StartUncaptured(one.node)
			continue
		}
		one.agent = one.host.StartSerf(one.node, one.host.Addr, one.advertise, s.agentJSON)
	}
	return f
}

// startCulvert starts the gateways and the sidecars.
func (f *federation) startCulvert(s settings) {
	f.t.Helper()
	for d, site := range f.Sites {
		f.gateways[d] = site.Gateway.StartCulvert("gateway", f.gatewayConfig(d))
	}
	for _, one := range f.servers {
		one.sidecar = one.host.StartCulvert("sidecar", f.sidecarConfig(one, s))
	}
}

// virtual is the address that a server advertises in all datacenters.
func virtual(ipv6 bool, dc, n int) netip.Addr {
	if ipv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd77::%d:%d", dc, n))
	}
	return netip.AddrFrom4([4]byte{127, 77, byte(dc), byte(n)})
}

func (f *federation) gatewayConfig(d int) string {
	site, other := f.Sites[d], f.Sites[1-d]
	var b strings.Builder
	wildcard := "0.0.0.0:8443"
	if f.IPv6 {
		wildcard = "[::]:8443"
	}
	fmt.Fprintf(&b, "datacenter = %q\nnode = \"gw\"\nlisten { address = %q }\n", site.Name, wildcard)
	for _, s := range f.servers {
		if s.dc == site.Name {
			fmt.Fprintf(&b, "sidecar %q { address = %q }\n", s.node, lab.HostPort(s.host.Addr, 8443))
		}
	}
	fmt.Fprintf(&b, "datacenter %q { gateways = [%q] }\n", other.Name, lab.HostPort(other.WAN, 8443))
	b.WriteString("log { level = \"debug\" }\n")
	return b.String()
}

func (f *federation) sidecarConfig(s *server, set settings) string {
	if set.domain == "" {
		set.domain = "consul"
	}
	gateway := f.Sites[0].Gateway
	if s.dc == f.Sites[1].Name {
		gateway = f.Sites[1].Gateway
	}
	var b strings.Builder
	capture := fmt.Sprintf("  advertise = %q\n}\n", s.advertise)
	if set.redirect {
		capture = "}\ncapture = \"redirect\"\n"
	}
	fmt.Fprintf(&b, `datacenter = %q
node       = %q
domain     = %q
server {
  profile   = "serf"
  address   = %q
%slisten { address = %q }
gateways = [%q]
log { level = "debug" }
%s%s`, s.dc, s.node, set.domain, s.host.Addr, capture, lab.HostPort(s.host.Addr, 8443), lab.HostPort(gateway.Addr, 8443),
		f.pki.Server(s.dc, s.node, set.domain), set.extra)
	for _, peer := range f.servers {
		if peer == s {
			continue
		}
		fmt.Fprintf(&b, "peer %q {\n  datacenter = %q\n  advertise = %q\n", peer.node, peer.dc, peer.advertise)
		if peer.dc == s.dc && !set.redirect {
			fmt.Fprintf(&b, "  address = %q\n", lab.HostPort(peer.host.Addr, 8443))
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// join joins everybody to the last server, and waits until each sees all alive.
func (f *federation) join() {
	f.t.Helper()
	last := f.servers[len(f.servers)-1]
	for _, s := range f.servers[:len(f.servers)-1] {
		if _, err := s.agent.Do("join", last.advertise.String()); err != nil {
			f.t.Fatal(err)
		}
	}
	f.allAlive()
}

func (f *federation) allAlive() {
	f.t.Helper()
	for _, s := range f.servers {
		lab.Eventually(f.t, converge, func() error { return s.agent.Sees("alive", f.nodes()...) })
	}
}

func (f *federation) nodes() []string {
	var out []string
	for _, s := range f.servers {
		out = append(out, s.node)
	}
	return out
}
