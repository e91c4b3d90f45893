package test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"culvert/test/lab"
)

// Each mode leads to the other datacenter by its own way.
func TestModes(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	f := newFederation(t, settings{hosts: [2]int{1, 1}, noAgents: true, extra: probeService})
	f.Route() // remote and direct need a route to where they dial
	flows := []*flow{startFlow(t, f.servers[0], f.servers[1]), startFlow(t, f.servers[1], f.servers[0])}
	for _, mode := range []string{"local", "remote", "direct"} {
		for i, s := range f.servers {
			other, far := f.servers[1-i], f.Sites[1-i]
			config := f.sidecarConfig(s, settings{domain: "consul", extra: probeService})
			address := fmt.Sprintf("  advertise = %q\n  address = %q\n", other.advertise, lab.HostPort(other.host.Addr, 8443))
			config = strings.Replace(config, fmt.Sprintf("  advertise = %q\n}\n", other.advertise), address+"}\n", 1)
			config += fmt.Sprintf("datacenter %q {\n  gateways = [%q]\n  mode = %q\n}\n", other.dc, lab.HostPort(far.WAN, 8443), mode)
			s.sidecar.Stop()
			s.sidecar = s.host.StartAnother("sidecar", "sidecar-"+mode, config, "127.0.0.1:7440")
		}
		for _, fl := range flows {
			fl.await(time.Now(), 10*time.Second)
		}
		for i, s := range f.servers {
			lab.Eventually(t, 5*time.Second, func() error {
				p := s.sidecar.Status().Peers[0]
				gateway := map[string]string{
					"local": lab.HostPort(f.Sites[i].Gateway.Addr, 8443), "remote": lab.HostPort(f.Sites[1-i].WAN, 8443),
				}[mode]
				if p.Path != mode || p.Gateway != gateway || p.State != "up" {
					return fmt.Errorf("mode %s: path %s by gateway %q, %s; want %q", mode, p.Path, p.Gateway, p.State, gateway)
				}
				return nil
			})
		}
	}
}

// Two domains share hosts and gateways, two gateways share the work, and one of
// them may go.
func TestTwoDomainsAndTwoGateways(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	f := newFederation(t, settings{hosts: [2]int{1, 1}, noSidecars: true, noAgents: true})
	nomad := lab.NewPKI(t, "nomad")
	var gateways [2][2]*lab.Daemon
	for d, site := range f.Sites {
		for g := range 2 {
			name := fmt.Sprintf("gw%d", g+1)
			config := fmt.Sprintf(`datacenter = %q
node    = %q
domain  = "consul"
domains = ["consul", "nomad"]
listen { address = "0.0.0.0:%d" }
sidecar %q { address = %q }
sidecar %q {
  address = %q
  domain  = "nomad"
}
datacenter %q { gateways = [%q, %q] }
%s
admin { address = "127.0.0.1:744%d" }
log {
  level  = "debug"
  format = "json"
}
`, site.Name, name, 8443+1000*g, names[d], lab.HostPort(site.Hosts[0].Addr, 8443), names[d], lab.HostPort(site.Hosts[0].Addr, 8445),
				f.Sites[1-d].Name, lab.HostPort(f.Sites[1-d].WAN, 8443), lab.HostPort(f.Sites[1-d].WAN, 9443),
				f.pki.Gateway(site.Name, name, "consul"), g)
			gateways[d][g] = site.Gateway.StartAnother("gateway", name, config, fmt.Sprintf("127.0.0.1:744%d", g))
		}
	}
	for i, s := range f.servers {
		s.node = names[i]
	}
	for i, s := range f.servers {
		f.startPair(t, i, s, nomad)
	}
	for _, s := range f.servers {
		s.agent = s.host.StartSerf(s.node, s.host.Addr, s.advertise, "")
	}
	f.join()

	// The second domain's servers, on the same hosts, have addresses of their own.
	var others [2]*server
	for i, s := range f.servers {
		others[i] = &server{test: t, dc: s.dc, node: s.node, host: s.host, advertise: virtual(false, 100+i, 1)}
	}
	flows := []*flow{startFlow(t, others[0], others[1]), startFlow(t, others[1], others[0])}
	for _, fl := range flows {
		fl.await(time.Now(), 10*time.Second)
	}

	gateways[0][0].Kill()
	gateways[1][1].Kill()
	killed := time.Now()
	for _, fl := range flows {
		fl.await(time.Now(), 10*time.Second)
	}
	f.allAlive()
	lab.Wait(3 * time.Second)
	for i, fl := range flows {
		t.Logf("a gateway killed on each side: longest gap of flow %d is %v", i, fl.longestGap(killed).Round(time.Millisecond))
	}
	// Once it is known dead, a gateway costs no packet any more.
	known := time.Now()
	lab.Wait(2 * time.Second)
	for i, fl := range flows {
		if gap := fl.longestGap(known); gap > time.Second {
			t.Errorf("with a gateway known dead, flow %d had a gap of %v", i, gap)
		}
	}

	// What is not TLS goes to the passthrough.
	c, err := f.Sites[0].Gateway.Dial("tcp", lab.HostPort(f.servers[0].host.Addr, 8445))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "plain")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "plain" {
		t.Errorf("through the passthrough: %q, %v", got, err)
	}
}

// startPair starts a host's two sidecars, one for each domain.
func (f *federation) startPair(t *testing.T, i int, s *server, nomad *lab.PKI) {
	t.Helper()
	other, gateway := f.servers[1-i], f.Sites[i].Gateway
	s.sidecar = s.host.StartAnother("sidecar", "consul", fmt.Sprintf(`datacenter = %q
node       = %q
domain     = "consul"
capture    = "bind"
on_exit    = "block"
server {
  profile   = "serf"
  address   = %q
  advertise = %q
}
listen { address = %q }
%s
gateways = [%q, %q]
peer %q {
  datacenter = %q
  advertise  = %q
}
`, s.dc, s.node, s.host.Addr, s.advertise, lab.HostPort(s.host.Addr, 8443), f.pki.Server(s.dc, s.node, "consul"),
		lab.HostPort(gateway.Addr, 8443), lab.HostPort(gateway.Addr, 9443), other.node, other.dc, other.advertise), "127.0.0.1:7440")

	echo, err := s.host.Listen("127.0.0.1:7007")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			_, _ = io.CopyN(c, c, 5)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = echo.Close(); <-done })
	s.host.StartAnother("sidecar", "nomad", fmt.Sprintf(`datacenter = %q
node       = %q
domain     = "nomad"
server {
  address   = %q
  advertise = %q
  hairpin   = false
}
service "probe" {
  kind  = "packet"
  port  = 7999
  local = %q
  alpn  = "test/probe"
}
listen {
  address     = %q
  passthrough = "127.0.0.1:7007"
}
%s
gateways = [%q, %q]
peer %q {
  datacenter = %q
  advertise  = %q
}
admin { address = "127.0.0.1:7441" }
`, s.dc, s.node, s.host.Addr, virtual(false, 100+i, 1), lab.HostPort(s.host.Addr, probePort), lab.HostPort(s.host.Addr, 8445),
		nomad.Server(s.dc, s.node, "nomad"), lab.HostPort(gateway.Addr, 8443), lab.HostPort(gateway.Addr, 9443),
		other.node, other.dc, virtual(false, 101-i, 1)), "127.0.0.1:7441")
}
