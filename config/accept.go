package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// accept reads what the entries of each datacenter may point at.
func (b *federationBlock) accept() {
	b.many("accept", func(in *block) {
		if !in.noLabel {
			b.d.datacenterName(in.label, in.named)
		}
		before := len(b.d.faults)
		advertise, placed := in.prefixes("advertise", "10.72.0.0/16")
		gateways, _ := in.prefixes("gateways", "203.0.113.0/24")
		if advertise == nil && gateways == nil && len(b.d.faults) == before {
			b.d.fault(in.at, `add advertise = ["10.72.0.0/16"] or gateways = ["203.0.113.0/24"]`, "%s has neither advertise nor gateways", in.name)
		}
		switch {
		case in.noLabel:
		case slices.ContainsFunc(b.f.Accept, func(o Accept) bool { return o.Datacenter == in.label }):
			b.d.fault(in.named, "give each datacenter one block", "%s is given twice", in.name)
		default:
			b.apart(in, placed)
			b.f.Accept = append(b.f.Accept, Accept{Datacenter: in.label, Advertise: advertise, Gateways: gateways})
		}
	})
}

// apart checks that the ranges of one datacenter overlap those of no other: an
// address in both would belong to whoever claims it first.
func (b *federationBlock) apart(in *block, placed []placedPrefix) {
	for _, p := range placed {
		for _, other := range b.f.Accept {
			i := slices.IndexFunc(other.Advertise, p.Overlaps)
			if i < 0 {
				continue
			}
			b.d.fault(p.at, "give each datacenter ranges of its own", "advertise%s has %s, which overlaps %s of accept %q",
				in.in(), p.Prefix, other.Advertise[i], other.Datacenter)
			break
		}
	}
}

// A placedPrefix is a range and where it stands in the file.
type placedPrefix struct {
	netip.Prefix
	at hcl.Range
}

// prefixes reads a list of ranges. It must not be empty: nothing would tell
// whether all is accepted then or nothing.
func (b *block) prefixes(key, example string) ([]netip.Prefix, []placedPrefix) {
	before := len(b.d.faults)
	items, at := b.list(key)
	if at.ok && len(items) == 0 && len(b.d.faults) == before {
		b.d.fault(at.at, fmt.Sprintf("leave it out to accept all, or write %s = [%q]", key, example), "%s%s is empty", key, b.in())
	}
	var out []netip.Prefix
	var placed []placedPrefix
	for _, it := range items {
		p, bad, hint := parsePrefix(it.text, example)
		switch {
		case bad != "":
			b.d.fault(it.at, hint, "%s%s has %q, %s", key, b.in(), it.text, bad)
		case slices.Contains(out, p):
			b.d.fault(it.at, "take one away", "%s%s has %s twice", key, b.in(), p)
		default:
			out = append(out, p)
			placed = append(placed, placedPrefix{p, it.at})
		}
	}
	return out, placed
}

// parsePrefix reads a range, or an address that stands for itself.
func parsePrefix(s, example string) (p netip.Prefix, bad, hint string) {
	var err error
	if strings.Contains(s, "/") {
		p, err = netip.ParsePrefix(s)
	} else {
		var a netip.Addr
		a, err = netip.ParseAddr(s)
		p = netip.PrefixFrom(a.WithZone(""), a.BitLen())
		if a.Zone() != "" {
			return p, "which has a zone", "write it without"
		}
	}
	switch {
	case err != nil:
		return p, "which is no range of addresses", fmt.Sprintf("write it as %s, or one address", example)
	case p.Addr().Is4In6():
		return p, "which is IPv4 written as IPv6", "write the IPv4 range"
	case p != p.Masked():
		return p, fmt.Sprintf("which has bits set beyond the first %d", p.Bits()), "write " + p.Masked().String()
	case p.Addr().IsUnspecified() && p.IsSingleIP():
		return p, "which is no address of a host", "write 0.0.0.0/0 or ::/0 for all"
	}
	return p, "", ""
}
