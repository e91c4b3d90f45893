package config

import (
	"fmt"
	"slices"
)

// gateway reads a whole file.
func (d *decoder) gateway(root *block) *Gateway {
	g := &Gateway{}
	g.Datacenter, g.Domain = root.identity("consul")
	d.gatewayNode(root, g)
	listed := d.domains(root, g)
	root.listen(&g.Listen, false)
	d.gatewaySidecars(root, g, listed)
	root.many("datacenter", func(b *block) {
		if !b.noLabel {
			d.datacenterName(b.label, b.named)
		}
		dc := Datacenter{Name: b.label, Gateways: b.gatewayList()}
		if len(dc.Gateways) == 0 {
			d.fault(b.at, `add gateways = ["203.0.113.7:8443"]`, "%s has no gateways", b.name)
		}
		switch {
		case b.label == g.Datacenter && b.label != "":
			d.fault(b.named, "sidecars of the own datacenter have sidecar blocks", "%s is this gateway's own", b.name)
		case b.noLabel:
		case slices.ContainsFunc(g.Datacenters, func(o Datacenter) bool { return o.Name == b.label }):
			d.fault(b.named, "give each datacenter one block", "%s is given twice", b.name)
		default:
			g.Datacenters = append(g.Datacenters, dc)
		}
	})
	identity := root.one("tls", func(b *block) { d.tls(b, &g.TLS, g.Datacenter, g.Node, g.Domain, roleGateway) })
	d.gatewayFederation(root, g, identity != nil)
	root.admin(&g.Admin)
	root.log(&g.Log)
	root.finish()
	return g
}

func (d *decoder) gatewayNode(root *block, g *Gateway) {
	var at value
	if g.Node, at = root.text("node"); at.set {
		if at.ok {
			d.labels("node", g.Node, at.at)
			d.fits(g.Node, roleGateway, g.Datacenter, g.Domain, at.at)
		}
		return
	}
	name, bad := "", "is not known"
	if d.o.Hostname != nil {
		if host, err := d.o.Hostname(); err == nil {
			name, bad = host, badLabels(host)
		}
	}
	if bad != "" {
		d.fault(root.at, `add node = "gw1"`, "node is missing, and the host's name %q %s", name, bad)
		return
	}
	g.Node = name
	d.fits(g.Node, roleGateway, g.Datacenter, g.Domain, root.at)
}

// domains reads the domains that are routed, and tells whether all are known.
func (d *decoder) domains(root *block, g *Gateway) bool {
	before := len(d.faults)
	items, at := root.list("domains")
	if !at.set {
		g.Domains = []string{g.Domain}
		return true
	}
	for _, it := range items {
		d.labels("domain", it.text, it.at)
		if slices.Contains(g.Domains, it.text) {
			d.fault(it.at, "take one away", "the domain %q is given twice", it.text)
			continue
		}
		g.Domains = append(g.Domains, it.text)
	}
	if at.ok && len(items) == 0 {
		d.fault(at.at, `leave it out, or write domains = ["consul"]`, "domains is empty")
	}
	return len(d.faults) == before
}

func (d *decoder) gatewaySidecars(root *block, g *Gateway, listed bool) {
	root.many("sidecar", func(b *block) {
		s := GatewaySidecar{Node: b.label}
		if !b.noLabel {
			d.labels("sidecar", b.label, b.named)
		}
		var at value
		if s.Address, at = b.address("address", use{port: defaultPort}, "", ""); !at.set {
			d.fault(b.at, `add address = "10.71.0.11:8443"`, "address is missing%s", b.in())
		}
		s.Domain = d.sidecarDomain(b, g, listed)
		d.fits(s.Node, roleServer, g.Datacenter, s.Domain, b.named)
		if !b.noLabel && slices.ContainsFunc(g.Sidecars, func(o GatewaySidecar) bool { return o.Node == s.Node && o.Domain == s.Domain }) {
			d.fault(b.named, "one block for each sidecar and domain", "%s of domain %q is given twice", b.name, s.Domain)
			return
		}
		g.Sidecars = append(g.Sidecars, s)
	})
}

// sidecarDomain reads the domain of a sidecar block. It has to be there where
// domains leaves a choice.
func (d *decoder) sidecarDomain(b *block, g *Gateway, listed bool) string {
	domain, at := b.text("domain")
	switch {
	case at.ok && listed && !slices.Contains(g.Domains, domain):
		d.fault(at.at, didYouMean(domain, g.Domains)+" (domains lists those that this gateway routes)", "domain%s is %q", b.in(), domain)
	case at.set || !listed || slices.Contains(g.Domains, g.Domain):
	case len(g.Domains) == 1:
		return g.Domains[0]
	default:
		d.fault(b.at, fmt.Sprintf("add domain = %q, or another of domains", g.Domains[0]),
			"domain is missing%s, and domains lacks this gateway's own, %q", b.in(), g.Domain)
	}
	if at.ok {
		return domain
	}
	return g.Domain
}
