package config

import (
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// The service kinds.
const (
	kindPacket = "packet"
	kindStream = "stream"
)

// ports are what a profile knows of its servers: the gossip port, and that of
// RPC where there is one of its own.
//
//nolint:gochecknoglobals // a table
var ports = map[string]struct{ gossip, rpc uint16 }{
	"consul":     {8302, 8300},
	"nomad":      {4648, 4647},
	"serf":       {7946, 0},
	"memberlist": {7946, 0},
}

func profileServices(profile string) []Service {
	p, ok := ports[profile]
	if !ok {
		return nil
	}
	out := []Service{
		{Name: "gossip-packet", Kind: kindPacket, Port: p.gossip, ALPN: "consul/wan-gossip/packet"},
		{Name: "gossip-stream", Kind: kindStream, Port: p.gossip, ALPN: "consul/wan-gossip/stream"},
	}
	if p.rpc != 0 {
		out = append(out, Service{Name: "rpc", Kind: kindStream, Port: p.rpc, Types: profile == "consul"})
	}
	return out
}

const (
	wildcardServer = `bind the server to one address and name that, or use capture = "redirect" and name the one that it sends to its peers from`
	wildcardPeer   = "the address that its peers know the server by, such as 127.77.1.1"
)

// sidecar reads a whole file.
func (d *decoder) sidecar(root *block) *Sidecar {
	s := &Sidecar{}
	server := root.one("server", func(b *block) { d.server(b, s) })
	if server == nil {
		d.fault(root.at, `add server { profile = "serf" }`, "the server block is missing")
	}
	domain := "consul"
	if s.Server.Profile == "nomad" {
		domain = "nomad"
	}
	s.Datacenter, s.Domain = root.identity(domain)
	var at value
	if s.Node, at = root.required("node", "alice"); at.ok {
		d.labels("node", s.Node, at.at)
		d.fits(s.Node, roleServer, s.Datacenter, s.Domain, at.at)
	}
	captured := d.capture(root, s)
	d.services(root, s)
	if s.Server.TLS && !d.anyProfile && !slices.ContainsFunc(s.Services, func(sv Service) bool { return sv.Types }) {
		d.fault(server.at, `take it away, or give the server the profile "consul"`,
			"tls in server is true, and no service has the type byte by which a server is told that TLS begins")
	}
	root.listen(&s.Listen, true)
	d.redirect(s, captured.at)
	s.Gateways = root.gatewayList()
	d.sidecarFederation(root, s)
	peers := d.peers(root, s)
	d.datacenters(root, s, peers)
	if root.one("tls", func(b *block) { d.tls(b, &s.TLS, s.Datacenter, s.Node, s.Domain, roleServer) }) == nil {
		d.fault(root.at, "`culvert tls cert create` makes what goes into it", "the tls block is missing")
	}
	root.admin(&s.Admin)
	root.log(&s.Log)
	root.finish()
	return s
}

func (d *decoder) server(b *block, s *Sidecar) {
	var sv Server
	var at value
	sv.Profile, at = b.oneOf("profile", "", "consul", "nomad", "serf", "memberlist")
	d.anyProfile = d.anyProfile || at.set && !at.ok
	if sv.Address, at = b.ip("address", wildcardServer); !at.set {
		sv.Address = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if sv.Advertise, at = b.ip("advertise", wildcardPeer); !at.set {
		sv.Advertise = sv.Address
	}
	sv.Hairpin = b.boolean("hairpin", true)
	sv.TLS = b.boolean("tls", false)
	if s.Server == (Server{}) {
		s.Server = sv
	}
}

func (d *decoder) capture(root *block, s *Sidecar) (at value) {
	s.Capture, at = root.oneOf("capture", CaptureBind, CaptureBind, CaptureRedirect)
	s.OnExit, _ = root.oneOf("on_exit", OnExitBlock, OnExitBlock, OnExitOpen)
	return at
}

// redirect checks what redirect needs of the rest.
func (d *decoder) redirect(s *Sidecar, at hcl.Range) {
	if s.Capture != CaptureRedirect {
		return
	}
	if s.Server.Address.IsLoopback() {
		d.fault(at, `add address = "10.71.0.11" to the server block: this host's address that the server sends to its peers from`,
			`capture is "redirect" and the server's address is %s, which no peer can know`, s.Server.Address)
	}
	if _, port, err := net.SplitHostPort(s.Listen.Address); err == nil && port == "0" {
		d.fault(at, "give listen a port: it names the rules, which outlive the sidecar", `capture is "redirect" and listen has port 0`)
	}
}

// path makes the name of a file absolute or relative to the working directory:
// in the configuration it is relative to the folder of that.
func (d *decoder) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(d.file), name)
}

func (d *decoder) tls(b *block, t *TLS, datacenter, node, domain, role string) {
	places := make(map[string]hcl.Range)
	read := func(key, example string) string {
		name, at := b.required(key, example)
		places[key] = at.at
		if !at.ok {
			return name
		}
		return d.path(name)
	}
	before := len(d.faults)
	got := TLS{read("ca_file", "consul-ca.pem"), read("cert_file", "alice.pem"), read("key_file", "alice-key.pem")}
	if *t == (TLS{}) {
		*t = got
	}
	if d.o.CheckTLS == nil || len(d.faults) > before {
		return
	}
	// Names that are faulty themselves would be missed in the certificate too.
	if badLabel(datacenter) != "" || badLabels(node) != "" || badLabels(domain) != "" {
		return
	}
	for _, p := range d.o.CheckTLS(got.CAFile, got.CertFile, got.KeyFile, datacenter, node, domain, role) {
		at, known := places[p.Field]
		if !known {
			at = b.at
		}
		d.fault(at, p.Hint, "%s", p.Summary)
	}
}

func (d *decoder) services(root *block, s *Sidecar) {
	s.Services = profileServices(s.Server.Profile)
	first := make(map[string]hcl.Range)
	places := make(map[string]hcl.Range) // of the port, or of the block
	root.many("service", func(b *block) {
		at, twice := first[b.label]
		if twice && !b.noLabel {
			d.fault(b.named, "give each service one block", "service %q is given twice, first on line %d", b.label, at.Start.Line)
		}
		first[b.label] = b.named
		if !serviceName.MatchString(b.label) && !b.noLabel {
			d.fault(b.named, `1 to 63 of a-z, 0-9 and "-"`, "service name %q is not allowed", b.label)
		}
		i := slices.IndexFunc(s.Services, func(x Service) bool { return x.Name == b.label })
		switch {
		case twice: // read for its faults alone
			again := Service{Name: b.label}
			if i >= 0 {
				again = s.Services[i]
			}
			d.service(b, &again)
			return
		case i < 0:
			s.Services = append(s.Services, Service{Name: b.label})
			i = len(s.Services) - 1
		}
		places[b.label] = d.service(b, &s.Services[i])
	})
	if len(s.Services) == 0 && !d.anyProfile {
		d.fault(root.at, `add profile = "serf" to server, or service blocks`, "there is no service to carry")
	}
	for i := range s.Services {
		if !s.Services[i].Local.IsValid() && s.Server.Address.IsValid() {
			s.Services[i].Local = netip.AddrPortFrom(s.Server.Address, s.Services[i].Port)
		}
	}
	d.clashes(root, s, places)
}

// service reads one service block into what the profile says, and returns the
// place of its port.
func (d *decoder) service(b *block, s *Service) hcl.Range {
	known := s.Kind != "" || d.anyProfile
	kind, at := b.oneOf("kind", s.Kind, kindPacket, kindStream)
	if !at.set && !known {
		d.fault(b.at, `add kind = "packet" (UDP) or kind = "stream" (TCP)`, "kind is missing%s", b.in())
	}
	s.Kind = kind
	place := b.named
	if port, at := b.number("port", 1, 65535); at.set {
		s.Port, place = uint16(port), at.at //nolint:gosec // within 65535
	} else if !known {
		d.fault(b.at, "add port = 7946", "port is missing%s", b.in())
	}
	if local, at := b.text("local"); at.ok {
		ap, err := netip.ParseAddrPort(local)
		if err != nil || ap.Port() == 0 || ap.Addr().IsUnspecified() {
			d.fault(at.at, `where the server listens, such as "10.71.0.11:8302"`, "local%s is %q, which is no address and port", b.in(), local)
		} else {
			s.Local = ap
		}
	}
	if name, at := b.text("alpn"); at.ok {
		s.ALPN, s.Types = name, false // one name for all of them
		if bad := badALPN(name); bad != "" {
			d.fault(at.at, "such as consul/wan-gossip/packet; Culvert's own name needs no mention", "alpn%s is %q: %s", b.in(), name, bad)
			s.ALPN = ""
		}
	}
	return place
}

func badALPN(name string) string {
	switch {
	case name == "":
		return "it is empty"
	case len(name) > 255:
		return "it is longer than 255 bytes"
	case strings.HasPrefix(name, "culvert/"):
		return "culvert/ names are Culvert's own"
	case name == "h2", strings.HasPrefix(name, "http/"):
		return "HTTP is no service"
	}
	return ""
}

// clashes finds services that cannot stand beside each other.
func (d *decoder) clashes(root *block, s *Sidecar, places map[string]hcl.Range) {
	at := func(name string) hcl.Range {
		if r, ok := places[name]; ok {
			return r
		}
		return root.at
	}
	for i, a := range s.Services {
		for _, b := range s.Services[:i] {
			if a.Port == b.Port && a.Kind == b.Kind && a.Kind != "" && a.Port != 0 {
				d.fault(at(a.Name), "give each its own port", "services %q and %q have one port, %d, and one kind, %s", b.Name, a.Name, a.Port, a.Kind)
			}
			if a.ALPN == b.ALPN && a.ALPN != "" {
				d.fault(at(a.Name), "give each its own, or none", "services %q and %q have one alpn, %q", b.Name, a.Name, a.ALPN)
			}
		}
	}
}
