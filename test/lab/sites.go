package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// A Size says how large one of several sites is.
type Size struct{ Hosts, Gateways int }

// Sites are several datacenters, each with a LAN of its own. Their gateway hosts
// share a WAN. A router lets the other hosts dial what is in the WAN, as a site's
// firewall does, and nothing else passes it: no host reaches another site's.
type Sites struct {
	t      testing.TB
	id     string
	center *Host // all switches
	All    []*WideSite
}

// A WideSite is one of them. Gateways have the addresses .1, .2 and so on in
// its LAN, 10.71.0.0/24 for the first, and hosts .11, .12 and so on.
type WideSite struct {
	Name     string // dc1, dc2 and so on
	Hosts    []*Host
	Gateways []*WideGateway

	sites *Sites
	n     int
}

// A WideGateway is the host of a gateway.
type WideGateway struct {
	*Host
	WAN netip.Addr
}

//nolint:gochecknoglobals // addresses are told apart within one process
var wans atomic.Int64

// ManySites builds a network of sites of the sizes given.
func ManySites(t testing.TB, sizes ...Size) *Sites {
	t.Helper()
	sweep()
	n := &Network{t: t, daemons: new(daemons)}
	id := fmt.Sprintf("%s-%d-%d", prefix, os.Getpid(), sequence.Add(1))
	dir := t.TempDir()
	s := &Sites{t: t, id: id, center: n.host(id, dir, "center", netip.Addr{})}
	s.center.quiet(false)
	ip(t, s.center.NS, "link set lo up", "link add name wan type bridge", "link set wan up", "addr add 10.79.255.254/16 dev wan")
	nft(t, s.center, `table inet router {
  counter plainly {}
  chain pre { type filter hook prerouting priority -400; ip daddr { 10.71.0.0/24, 10.72.0.0/24, 10.73.0.0/24 } counter name plainly; }
  chain forward { type filter hook forward priority 0; policy drop;
    ct state established accept
    oifname wan tcp dport 8443 accept
  }
  chain post { type nat hook postrouting priority 100; oifname wan masquerade; }
}
`)
	s.center.set(map[string]string{"ipv4/ip_forward": "1", "bridge/bridge-nf-call-iptables": "0"}) // switches filter nothing
	for i, size := range sizes {
		site := &WideSite{Name: fmt.Sprintf("dc%d", i+1), sites: s, n: i}
		s.All = append(s.All, site)
		ip(t, s.center.NS, "link add name "+site.Name+" type bridge", "link set "+site.Name+" up",
			"addr add "+site.lan(254).String()+"/24 dev "+site.Name)
		for range size.Hosts {
			site.AddHost()
		}
		for range size.Gateways {
			site.AddGateway()
		}
	}
	return s
}

// SentPlainly is how many packets hosts have sent for another site's LAN, past
// their sidecars.
func (s *Sites) SentPlainly() int {
	s.t.Helper()
	return counters(s.t, s.center, "router")["plainly"]
}

func (w *WideSite) lan(host int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(71 + w.n), 0, byte(host)})
}

// AddHost adds a host to the site.
func (w *WideSite) AddHost() *Host {
	w.sites.t.Helper()
	i := len(w.Hosts) + 1
	h := w.sites.host(fmt.Sprintf("%sh%d", w.Name, i), w.lan(10+i))
	w.sites.plug(h, "eth0", w.Name, h.Addr)
	ip(w.sites.t, h.NS, "route add default via "+w.lan(254).String())
	w.Hosts = append(w.Hosts, h)
	return h
}

// AddGateway adds the host of a gateway, with addresses that none had before.
func (w *WideSite) AddGateway() *WideGateway {
	w.sites.t.Helper()
	i := len(w.Gateways) + 1
	g := &WideGateway{
		Host: w.sites.host(fmt.Sprintf("%sgw%d", w.Name, i), w.lan(i)),
		WAN:  netip.AddrFrom4([4]byte{10, 79, byte(w.n), byte(wans.Add(1)%250 + 1)}),
	}
	w.sites.plug(g.Host, "eth0", w.Name, g.Addr)
	w.sites.plug(g.Host, "wan0", "wan", g.WAN)
	w.Gateways = append(w.Gateways, g)
	return g
}

func (s *Sites) host(name string, addr netip.Addr) *Host {
	s.t.Helper()
	h := (&Network{t: s.t, daemons: s.center.daemons}).host(s.id, filepath.Dir(s.center.Dir), name, addr)
	h.quiet(false)
	ip(s.t, h.NS, "link set lo up")
	return h
}

// plug connects a host's interface to a switch. The WAN's network is wide, so
// that each site has a range of its own in it.
func (s *Sites) plug(h *Host, link, to string, addr netip.Addr) {
	s.t.Helper()
	port := strings.TrimPrefix(h.NS, s.id+"-") + link[:1]
	bits := "/24"
	if to == "wan" {
		bits = "/16"
	}
	ip(s.t, "", fmt.Sprintf("link add name %s netns %s type veth peer name %s netns %s", link, h.NS, port, s.center.NS))
	ip(s.t, s.center.NS, "link set "+port+" master "+to+" up")
	ip(s.t, h.NS, "addr add "+addr.String()+bits+" dev "+link, "link set "+link+" up")
}

// Names gives a host its own file of host names, in which each line is an
// address and a name; what is started afterwards reads it. Calling it again
// changes what the names stand for.
func (h *Host) Names(lines ...string) {
	h.t.Helper()
	dir := filepath.Join("/etc/netns", h.NS)
	if _, err := os.Stat(dir); err != nil {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			h.t.Fatal(err)
		}
		h.t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				h.t.Error(err)
			}
		})
	}
	// In place: what runs has this file mounted.
	text := "127.0.0.1 localhost\n" + strings.Join(lines, "\n") + "\n"
	if err := os.WriteFile(filepath.Join(dir, "hosts"), []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// BeginCulvert is [Host.StartCulvert] without the wait until it is ready.
func (h *Host) BeginCulvert(kind, config string) *Daemon {
	h.t.Helper()
	file := h.WriteFile(kind+".hcl", config)
	keepConfig(h.t, kind, config)
	return h.StartDaemon("culvert-"+kind, adminAddr, Culvert(h.t), kind, "--config", file)
}
