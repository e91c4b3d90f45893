package config

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/hashicorp/hcl/v2"
)

// A placedPeer is a peer and where it stands in the file.
type placedPeer struct {
	Peer
	at      hcl.Range // of the block's label
	needsAt hcl.Range // where an address would have to stand
}

// peers reads the catalog.
func (d *decoder) peers(root *block, s *Sidecar) []placedPeer {
	var out []placedPeer
	taken := make(map[netip.Addr]string)
	if s.Server.Advertise.IsValid() {
		taken[s.Server.Advertise] = "this server itself"
	}
	root.many("peer", func(b *block) {
		p := placedPeer{at: b.named, needsAt: b.at}
		p.Node = b.label
		if !b.noLabel {
			d.labels("peer", b.label, b.named)
		}
		var at value
		if p.Datacenter, at = b.required("datacenter", "dc2"); at.ok {
			d.datacenterName(p.Datacenter, at.at)
		}
		d.fits(p.Node, roleServer, p.Datacenter, s.Domain, b.named)
		p.Advertise, at = b.ip("advertise", wildcardPeer)
		if !at.set {
			d.fault(b.at, `add advertise = "127.77.2.1"`, "advertise is missing%s", b.in())
		}
		d.advertised(b, p, at.at, s, taken)
		p.Address, _ = b.address("address", use{port: defaultPort}, "", "")
		switch {
		case p.Datacenter == s.Datacenter && p.Node == s.Node && p.Node != "":
			d.fault(b.named, "a peer is another server: take the block away", "%s has this sidecar's own datacenter and name", b.name)
		case p.Node != "" && slices.ContainsFunc(out, func(o placedPeer) bool { return o.Datacenter == p.Datacenter && o.Node == p.Node }):
			d.fault(b.named, "names are unique in a datacenter", "peer %s/%s is given twice", p.Datacenter, p.Node)
		}
		out = append(out, p)
	})
	for _, p := range out {
		s.Peers = append(s.Peers, p.Peer)
	}
	return out
}

// advertised checks that a peer's address can be told from all others.
func (d *decoder) advertised(b *block, p placedPeer, at hcl.Range, s *Sidecar, taken map[netip.Addr]string) {
	if !p.Advertise.IsValid() {
		return
	}
	if other, ok := taken[p.Advertise]; ok {
		d.fault(at, "each server needs an address of its own, the same in all datacenters", "advertise%s is %s, which is that of %s", b.in(), p.Advertise, other)
		return
	}
	for _, sv := range s.Services {
		// The peer's endpoint could not be bound.
		if sv.Local == netip.AddrPortFrom(p.Advertise, sv.Port) {
			d.fault(at, "give it the address that the peer advertises, not this server's", "advertise%s is %s, where this server listens itself (%s)", b.in(), p.Advertise, sv.Local)
			break
		}
	}
	if s.Capture == CaptureRedirect && (p.Advertise.IsLoopback() || p.Advertise.IsLinkLocalUnicast()) {
		d.fault(at, `give the peer's real address, or use capture = "bind" with virtual ones`,
			`advertise%s is %s, and capture is "redirect": no server of another host has this address`, b.in(), p.Advertise)
	}
	taken[p.Advertise] = fmt.Sprintf("%s/%s", p.Datacenter, p.Node)
	if own := s.Server.Advertise; own.IsValid() && own.Is4() != p.Advertise.Is4() {
		d.fault(at, "servers that gossip with each other use one family", "advertise%s is %s and this server's is %s: IPv4 and IPv6", b.in(), p.Advertise, own)
	}
}

// datacenters reads the datacenter blocks and settles how each other datacenter
// is reached.
func (d *decoder) datacenters(root *block, s *Sidecar, peers []placedPeer) {
	root.many("datacenter", func(b *block) {
		dc := Datacenter{Name: b.label, Gateways: b.gatewayList()}
		if !b.noLabel {
			d.datacenterName(b.label, b.named)
		}
		mode, at := b.oneOf("mode", "", "local", "remote", "direct")
		dc.Mode = mode
		if at.ok && s.Federation == nil {
			d.modeHasWhatItNeeds(b, s, dc, at.at)
		}
		switch {
		case b.label == s.Datacenter && b.label != "":
			d.fault(b.named, "gateways of the own datacenter stand in gateways, at the top", "%s is this sidecar's own", b.name)
		case b.noLabel:
		case slices.ContainsFunc(s.Datacenters, func(o Datacenter) bool { return o.Name == b.label }):
			d.fault(b.named, "give each datacenter one block", "%s is given twice", b.name)
		default:
			s.Datacenters = append(s.Datacenters, dc)
		}
	})
	for _, p := range peers {
		if p.Datacenter != s.Datacenter && p.Datacenter != "" &&
			!slices.ContainsFunc(s.Datacenters, func(o Datacenter) bool { return o.Name == p.Datacenter }) {
			s.Datacenters = append(s.Datacenters, Datacenter{Name: p.Datacenter})
		}
	}
	if s.Federation != nil {
		// What leads where is known when the records are. A mode that is not
		// given is chosen then, and nothing can be missed now.
		return
	}
	for i := range s.Datacenters {
		if s.Datacenters[i].Mode == "" {
			s.Datacenters[i].Mode = defaultMode(s, s.Datacenters[i])
		}
	}
	d.reachable(s, peers)
}

func (d *decoder) modeHasWhatItNeeds(b *block, s *Sidecar, dc Datacenter, at hcl.Range) {
	switch {
	case dc.Mode == "local" && len(s.Gateways) == 0:
		d.fault(at, `add gateways = ["10.71.0.1:8443"] at the top`, "mode%s is \"local\" and this datacenter has no gateways", b.in())
	case dc.Mode == "remote" && len(dc.Gateways) == 0:
		d.fault(at, `add gateways = ["gw.dc2.example:8443"] to the block`, "mode%s is \"remote\" and the block has no gateways", b.in())
	}
}

func defaultMode(s *Sidecar, dc Datacenter) string {
	switch {
	case len(s.Gateways) > 0:
		return "local"
	case len(dc.Gateways) > 0:
		return "remote"
	}
	return "direct"
}

// reachable finds peers to whom there is no way.
func (d *decoder) reachable(s *Sidecar, peers []placedPeer) {
	for _, p := range peers {
		if p.Address != "" || p.Datacenter == "" {
			continue
		}
		if p.Datacenter == s.Datacenter {
			if p.Node != s.Node && s.Capture == CaptureBind { // with redirect siblings are reached as they are
				d.fault(p.needsAt, `add address = "10.71.0.12:8443", its sidecar's`,
					"peer %q is of this datacenter and has no address", p.Node)
			}
			continue
		}
		i := slices.IndexFunc(s.Datacenters, func(o Datacenter) bool { return o.Name == p.Datacenter })
		if i < 0 || s.Datacenters[i].Mode != "direct" {
			continue
		}
		d.fault(p.needsAt, fmt.Sprintf("add gateways at the top, gateways in datacenter %q, or the address of its sidecar to the peer", p.Datacenter),
			"nothing leads to peer %q of %s", p.Node, p.Datacenter)
	}
}
