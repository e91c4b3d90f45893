package config

import (
	"slices"
)

// gateway reads a whole file.
func (d *decoder) gateway(root *block) *Gateway {
	g := &Gateway{}
	g.Datacenter, g.Domain = root.identity("consul")
	d.gatewayNode(root, g)
	d.domains(root, g)
	root.listen(&g.Listen, false)
	d.gatewaySidecars(root, g)
	root.many("datacenter", func(b *block) {
		d.datacenterName(b.label, b.named)
		dc := Datacenter{Name: b.label, Gateways: b.gatewayList()}
		if len(dc.Gateways) == 0 {
			d.fault(b.at, `add gateways = ["203.0.113.7:8443"]`, "%s has no gateways", b.name)
		}
		switch {
		case b.label == g.Datacenter && b.label != "":
			d.fault(b.named, "sidecars of the own datacenter have sidecar blocks", "%s is this gateway's own", b.name)
		case slices.ContainsFunc(g.Datacenters, func(o Datacenter) bool { return o.Name == b.label }):
			d.fault(b.named, "give each datacenter one block", "%s is given twice", b.name)
		default:
			g.Datacenters = append(g.Datacenters, dc)
		}
	})
	root.one("tls", func(b *block) { d.tls(b, &g.TLS, g.Datacenter, g.Node, g.Domain, "gateway") })
	d.federation(root)
	root.admin(&g.Admin)
	root.log(&g.Log)
	root.finish()
	return g
}

func (d *decoder) gatewayNode(root *block, g *Gateway) {
	var at value
	if g.Node, at = root.text("node"); at.set {
		d.labels("node", g.Node, at.at)
		return
	}
	if d.o.Hostname == nil {
		return
	}
	name, err := d.o.Hostname()
	if err != nil || badLabels(name) != "" {
		d.fault(root.at, `add node = "gw1"`, "node is missing, and the host's name %q cannot stand for it", name)
		return
	}
	g.Node = name
}

func (d *decoder) domains(root *block, g *Gateway) {
	items, at := root.list("domains")
	if !at.set {
		g.Domains = []string{g.Domain}
		return
	}
	for _, it := range items {
		d.labels("domain", it.text, it.at)
		if slices.Contains(g.Domains, it.text) {
			d.fault(it.at, "take one away", "the domain %q is given twice", it.text)
			continue
		}
		g.Domains = append(g.Domains, it.text)
	}
	if len(items) == 0 {
		d.fault(at.at, `leave it out, or write domains = ["consul"]`, "domains is empty")
	}
}

func (d *decoder) gatewaySidecars(root *block, g *Gateway) {
	root.many("sidecar", func(b *block) {
		s := GatewaySidecar{Node: b.label, Domain: g.Domain}
		if b.label != "" {
			d.labels("sidecar", b.label, b.named)
		}
		var at value
		if s.Address, at = b.address("address", defaultPort, "", ""); !at.set {
			d.fault(b.at, `add address = "10.71.0.11:8443"`, "address is missing%s", b.in())
		}
		if domain, at := b.text("domain"); at.set {
			s.Domain = domain
			if !slices.Contains(g.Domains, domain) {
				d.fault(at.at, didYouMean(domain, g.Domains)+" (domains lists those that this gateway routes)", "domain%s is %q", b.in(), domain)
			}
		} else if len(g.Domains) > 0 && !slices.Contains(g.Domains, g.Domain) {
			s.Domain = g.Domains[0]
		}
		if slices.ContainsFunc(g.Sidecars, func(o GatewaySidecar) bool { return o.Node == s.Node && o.Domain == s.Domain }) {
			d.fault(b.named, "one block for each sidecar and domain", "%s of domain %q is given twice", b.name, s.Domain)
			return
		}
		g.Sidecars = append(g.Sidecars, s)
	})
}
