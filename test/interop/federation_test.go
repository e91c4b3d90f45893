package interop

import (
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"text/template"
	"time"

	"culvert/test/lab"
)

// A kind is what a sidecar knows of its servers, and where it listens itself.
type kind struct {
	Profile, Domain string
	Port            int
	Admin           string
}

var (
	consulKind = kind{"consul", "consul", 8443, "127.0.0.1:7440"}
	nomadKind  = kind{"nomad", "nomad", 8445, "127.0.0.1:7441"}
)

// A way is how a federation is built. The zero one captures by bind and has
// culvert's own gateways.
type way struct {
	redirect bool
	plain    bool                      // no Culvert: the sites are routed plainly
	tls      bool                      // the servers have TLS of their own
	gateway  func(*federation, siteAt) // nil: culvert gateway
}

// A siteAt is a site and its place in the network.
type siteAt int

// A server is one server: its host, its address in all datacenters and its
// sidecar.
type server struct {
	Site, Node string
	Kind       kind
	Host       *lab.Host
	Advertise  netip.Addr
	at         siteAt
	sidecar    *lab.Daemon
}

// A federation is two sites with servers in both, and everything of Culvert that
// they need.
type federation struct {
	*lab.Network
	way
	t       *testing.T
	pki     map[string]*lab.PKI // by domain
	servers []*server

	guard *lab.Guard
	tap   *lab.Tap
}

// names are those of the servers, by site.
var names = [2][]string{{"alice", "amy", "anna"}, {"bob", "ben", "bill"}}

// newFederation builds the network and starts gateways and sidecars of some
// kinds for the first hosts of both sites, as many as servers says.
func newFederation(t *testing.T, w way, hosts lab.Options, servers [2]int, kinds ...kind) *federation {
	t.Helper()
	f := &federation{t: t, way: w, Network: lab.TwoSites(t, hosts), pki: make(map[string]*lab.PKI)}
	for _, k := range kinds {
		f.pki[k.Domain] = lab.NewPKI(t, k.Domain)
		for i, site := range f.Sites {
			for n, host := range site.Hosts[:servers[i]] {
				s := &server{Site: site.Name, Node: names[i][n], Kind: k, Host: host, Advertise: host.Addr, at: siteAt(i)}
				if !w.redirect {
					s.Advertise = netip.AddrFrom4([4]byte{127, 77, byte(i + 1), byte(n + 1)})
				}
				f.servers = append(f.servers, s)
			}
		}
	}
	if w.plain {
		f.Route()
		return f
	}
	if w.redirect {
		f.DefaultRoutes()
	}
	f.guard, f.tap = f.Guard(), f.Tap()
	for i := range f.Sites {
		if w.gateway == nil {
			culvertGateway(f, siteAt(i))
		} else {
			w.gateway(f, siteAt(i))
		}
	}
	for _, s := range f.servers {
		s.sidecar = s.Host.StartAnother("sidecar", "sidecar-"+s.Kind.Domain, f.sidecarConfig(s), s.Kind.Admin)
	}
	return f
}

// culvertGateway starts culvert's own gateway of a site.
func culvertGateway(f *federation, at siteAt) {
	f.t.Helper()
	site, other := f.Sites[at], f.Sites[1-at]
	var b strings.Builder
	fmt.Fprintf(&b, "datacenter = %q\nnode = \"gw\"\nlisten { address = \"0.0.0.0:8443\" }\ndomains = [\"consul\", \"nomad\"]\n", site.Name)
	for _, s := range f.servers {
		if s.at == at {
			fmt.Fprintf(&b, "sidecar %q {\n  domain = %q\n  address = %q\n}\n", s.Node, s.Kind.Domain, lab.HostPort(s.Host.Addr, s.Kind.Port))
		}
	}
	fmt.Fprintf(&b, "datacenter %q { gateways = [%q] }\n", other.Name, lab.HostPort(other.WAN, 8443))
	site.Gateway.StartCulvert("gateway", b.String())
}

//go:embed sidecar.hcl.tmpl
var sidecarTemplate string

// A peer is a block of a sidecar's configuration.
type peer struct {
	*server
	Address string // of its sidecar; "" where it is not dialled
}

func (f *federation) sidecarConfig(s *server) string {
	f.t.Helper()
	var peers []peer
	for _, other := range f.servers {
		if other == s || other.Kind != s.Kind {
			continue
		}
		p := peer{server: other}
		if other.Site == s.Site && !f.redirect {
			p.Address = lab.HostPort(other.Host.Addr, other.Kind.Port)
		}
		peers = append(peers, p)
	}
	parsed, err := template.New("sidecar").Parse(sidecarTemplate)
	if err != nil {
		f.t.Fatal(err)
	}
	var b strings.Builder
	if err := parsed.Execute(&b, struct {
		*server
		Redirect bool
		Gateway  netip.Addr
		Peers    []peer
		TLS      string
	}{s, f.redirect, f.Sites[s.at].Gateway.Addr, peers, f.pki[s.Kind.Domain].Server(s.Site, s.Node, s.Kind.Domain)}); err != nil {
		f.t.Fatal(err)
	}
	return b.String()
}

// of are the servers of a kind and a site.
func (f *federation) of(k kind, at siteAt) []*server {
	var out []*server
	for _, s := range f.servers {
		if s.Kind == k && s.at == at {
			out = append(out, s)
		}
	}
	return out
}

// addresses are those that servers have in their own datacenter.
func addresses(all []*server, of func(*server) netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, s := range all {
		out = append(out, of(s))
	}
	return out
}

func lan(s *server) netip.Addr { return s.Host.Addr }
func wan(s *server) netip.Addr { return s.Advertise }

// wantTLSAlone checks that nothing crossed the WAN link but TLS on port 8443, and
// that no server sent anything past its sidecar.
func (f *federation) wantTLSAlone() {
	f.t.Helper()
	passed, dropped := f.guard.Counts()
	if passed == 0 || dropped != 0 {
		f.t.Errorf("on the WAN link %d packets passed and %d were dropped, want some and none", passed, dropped)
	}
	f.tap.Check(f.t, 0x16)
	if f.redirect {
		if n := f.SentPlainly(); n != 0 {
			f.t.Errorf("%d packets for the other site left plainly", n)
		}
	}
	f.t.Logf("%d packets crossed the WAN link, all of them TLS on port 8443", passed)
}

// all calls f for each until none has an error.
func all[T any](t *testing.T, limit time.Duration, each []T, f func(T) error) time.Duration {
	t.Helper()
	return lab.Eventually(t, limit, func() error {
		var lacks []error
		for _, one := range each {
			lacks = append(lacks, f(one))
		}
		return errors.Join(lacks...)
	})
}
