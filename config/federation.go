package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/zclconf/go-cty/cty"
)

// The limits of reap. An entry that is forgotten while its owner restarts would
// take its endpoints away from everybody; one that is kept for years is not
// reaped.
const (
	defaultReap = 72 * time.Hour
	minReap     = 10 * time.Minute
	maxReap     = 365 * 24 * time.Hour
)

// A standing is what a datacenter is in its federation.
type standing int

const (
	unknown standing = iota // one of the two names is faulty
	primary
	secondary
)

// A federationBlock is a federation block that is being read.
type federationBlock struct {
	*block
	f    *Federation
	is   standing
	data value // of data_dir
}

// federation reads the block that sidecars and gateways have, nil where there
// is none; rest reads what only one of them has.
func (d *decoder) federation(root *block, datacenter string, rest func(*federationBlock)) *Federation {
	var out *Federation
	root.one("federation", func(in *block) {
		b := &federationBlock{block: in, f: &Federation{}}
		b.standing(datacenter)
		b.primaryGateways()
		b.dataDir()
		rest(b)
		b.accept()
		out = b.f
	})
	return out
}

// standing reads the primary's name and tells from it what this datacenter is.
func (b *federationBlock) standing(own string) {
	name, at := b.required("primary_datacenter", "dc1")
	b.f.PrimaryDatacenter = name
	if at.ok {
		b.d.datacenterName(name, at.at)
	}
	switch {
	case badLabel(name) != "" || badLabel(own) != "":
	case name == own:
		b.is = primary
	default:
		b.is = secondary
	}
}

// unwanted knows a key and notes it where it stands: it is of no use here.
func (b *federationBlock) unwanted(key, hint, why string) {
	b.know(key)
	if attr := b.body.Attributes[key]; attr != nil {
		b.d.fault(attr.NameRange, hint, "%s%s %s", key, b.in(), why)
	}
}

// ofThePrimary notes a key of the primary in a secondary, and tells whether it
// may be read.
func (b *federationBlock) ofThePrimary(key string) bool {
	if b.is != secondary {
		return true
	}
	b.unwanted(key, "take it away: a secondary keeps no store, and primary_gateways lead to the primary's",
		fmt.Sprintf("is for the primary datacenter, which is %s", b.f.PrimaryDatacenter))
	return false
}

func (b *federationBlock) primaryGateways() {
	if b.is == primary {
		b.unwanted("primary_gateways", "take it away: retry_join names the sidecars of the primary", "is for secondaries, and this datacenter is the primary")
		return
	}
	b.f.PrimaryGateways = b.addresses("primary_gateways", "primary gateway", func(what string, it item) string {
		name, ok := strings.CutPrefix(it.text, "srv:")
		if !ok {
			return b.d.listed(what, it)
		}
		if bad := badSRV(name); bad != "" {
			b.d.fault(it.at, `write "srv:" and the name of SRV records, such as srv:_gw._tcp.dc1.example`, "%s is %q: %s", what, it.text, bad)
			return ""
		}
		return it.text
	})
}

// badSRV says what is wrong with the name of SRV records, whose labels may
// begin with "_" (RFC 2782); "" if nothing is.
func badSRV(name string) string {
	if strings.Contains(name, ":") {
		return "SRV records tell the port themselves"
	}
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if digits.MatchString(name) {
		return "it has an address or a port where a name should be"
	}
	for label := range strings.SplitSeq(name, ".") {
		if bad := badLabel(strings.TrimPrefix(label, "_")); bad != "" {
			return fmt.Sprintf("the label %q %s", label, bad)
		}
	}
	if len(name) > maxName {
		return fmt.Sprintf("the name has %d characters, at most %d are allowed", len(name), maxName)
	}
	return ""
}

// dataDir has no default: whoever wants memory alone has to say so, since a
// restart then begins with nothing.
func (b *federationBlock) dataDir() {
	const hint = `add data_dir = "/var/lib/culvert", a folder that is kept, or data_dir = "" for memory alone`
	dir, at := b.text("data_dir")
	if !at.set {
		b.d.fault(b.at, hint, "data_dir is missing%s", b.in())
	}
	if dir != "" {
		dir = b.d.path(dir)
	}
	b.f.DataDir, b.data = dir, at
}

// ownAddress reads the address under which others reach this process. Where
// none is given it is the one that it listens on; open tells that this cannot be
// dialled, and that the caller has to find another.
func (b *federationBlock) ownAddress(key, listen string) (address string, open bool) {
	address, at := b.address(key, use{port: defaultPort}, "", "")
	if at.set {
		if bad := onlyHere(address); bad != "" {
			b.d.fault(at.at, "give one that other hosts can dial", "%s%s is %s, %s", key, b.in(), address, bad)
			return "", false
		}
		return address, false
	}
	if listen == "" { // which has been told
		return "", false
	}
	host, port, _ := net.SplitHostPort(listen) // as it was joined
	if a, err := netip.ParseAddr(host); err == nil && a.Unmap().IsUnspecified() || port == "0" || onlyHere(listen) != "" {
		return "", true
	}
	return listen, false
}

// onlyHere says why an address that can be dialled here cannot be dialled by
// others; "" if it can. Loopback can: several may share one host.
func onlyHere(address string) string {
	host, _, _ := net.SplitHostPort(address) // as it was joined
	a, err := netip.ParseAddr(host)
	switch {
	case err != nil:
	case a.Zone() != "":
		return "whose zone means something on this host alone"
	case a.IsMulticast():
		return "which stands for a group"
	}
	return ""
}

// sidecarFederation reads the block of a sidecar.
func (d *decoder) sidecarFederation(root *block, s *Sidecar) {
	s.Federation = d.federation(root, s.Datacenter, func(b *federationBlock) {
		b.elsewhere = map[string]string{"wan_address": "it is a gateway's: what other datacenters dial"}
		b.sidecarAddress(s)
		listed := b.retryJoin()
		b.bootstrap(s.Listen.Address, listed)
		b.reap()
		named := slices.ContainsFunc(s.Datacenters, func(dc Datacenter) bool { return dc.Name == b.f.PrimaryDatacenter && len(dc.Gateways) > 0 })
		if b.is == secondary && len(b.f.PrimaryGateways) == 0 && len(s.Gateways) == 0 && !named {
			d.fault(b.at, fmt.Sprintf(`add primary_gateways = ["gw.%s.example:8443"] to it, or gateways = ["10.71.0.1:8443"] at the top`, b.f.PrimaryDatacenter),
				"nothing leads to the primary datacenter, %s", b.f.PrimaryDatacenter)
		}
	})
}

// sidecarAddress takes the server's address where the listener has none of its
// own: both are of one host.
func (b *federationBlock) sidecarAddress(s *Sidecar) {
	const hint = `add address = "10.71.0.11:8443", what this datacenter dials`
	address, open := b.ownAddress("address", s.Listen.Address)
	b.f.Address = address
	if !open {
		return
	}
	_, port, _ := net.SplitHostPort(s.Listen.Address) // as it was joined
	switch server := s.Server.Address; {
	case port == "0":
		b.d.fault(b.at, hint, "address is missing%s, and others cannot dial %s, where the sidecar listens", b.in(), s.Listen.Address)
	case !server.IsValid(): // which has been told
	case server.IsLoopback():
		b.d.fault(b.at, hint, "address is missing%s, and others can dial neither %s, where the sidecar listens, nor %s, where the server does",
			b.in(), s.Listen.Address, server)
	default:
		b.f.Address = net.JoinHostPort(server.String(), port)
	}
}

// retryJoin reads the list, and tells whether all of it is well.
func (b *federationBlock) retryJoin() bool {
	before := len(b.d.faults)
	if b.ofThePrimary("retry_join") {
		b.f.RetryJoin = b.addresses("retry_join", "sidecar", b.d.listed)
	}
	return len(b.d.faults) == before
}

// bootstrap reads how many sidecars begin the store together. Where there are
// others to join it has no default: each of two that began a store alone would
// take the other's for a stranger's.
func (b *federationBlock) bootstrap(listen string, listed bool) {
	const key = "bootstrap_expect"
	if !b.ofThePrimary(key) {
		return
	}
	n, at := b.whole(key, 3, "one of 0 (only joins), 1 (alone), 3, 5 and 7", func(n int64) bool { return n >= 0 && n <= 7 })
	joins := len(b.f.RetryJoin) > 0
	if b.is == unknown || at.set && !at.ok {
		return
	}
	switch {
	case !at.set && joins:
		b.d.fault(b.at, "add bootstrap_expect = 3 to each of the first three, which begin the store together, or 0 to join one that exists",
			"%s is missing%s, and there is retry_join", key, b.in())
	case !at.set:
		n = 1
	case n > 0 && n%2 == 0:
		b.d.fault(at.at, fmt.Sprintf("write %d: %d voters survive no more failures than %d", n+1, n, n-1), "%s%s is %d, an even number", key, b.in(), n)
	case n == 1 && joins:
		b.d.fault(at.at, "write 0 to join a store that exists, or 3 in each of three that begin one together",
			"%s%s is 1, and there is retry_join: two sidecars could each begin a store of their own", key, b.in())
	case n > 1 && !joins:
		b.d.fault(at.at, fmt.Sprintf("name the %d others in retry_join, or write 1", n-1), "%s%s is %d, and there is no retry_join", key, b.in(), n)
	case n == 0 && !joins:
		b.d.fault(at.at, "name sidecars of the store in retry_join, or write 1 to begin one", "%s%s is 0, and there is no retry_join: nobody to join", key, b.in())
	case listed && b.f.Address != "":
		b.candidates(int(n), listen, at)
	}
	b.f.BootstrapExpect = int(n)
	if memory := b.data.ok && b.f.DataDir == ""; memory && n != 1 {
		b.d.fault(b.data.at, "give a folder that is kept, such as /var/lib/culvert: a voter must not forget its votes",
			`data_dir%s is "", which is memory only with more than one voter`, b.in())
	}
}

// candidates checks that there are enough to begin a store, and too few to begin
// two.
func (b *federationBlock) candidates(expect int, listen string, at value) {
	own := func(other string) bool { return sameAddress(other, b.f.Address) || sameAddress(other, listen) }
	others := len(slices.DeleteFunc(slices.Clone(b.f.RetryJoin), own))
	all := others + 1
	const summary = "bootstrap_expect%s is %d, and there are %d candidates, this sidecar and %d more of retry_join"
	switch {
	case others == 0 && expect == 0:
		b.d.fault(at.at, "name the others of the store in retry_join, or write 1 and take retry_join away",
			"bootstrap_expect%s is 0, and retry_join names this sidecar alone: nobody to join", b.in())
	case expect == 0:
	case all < expect:
		b.d.fault(at.at, fmt.Sprintf("name %d others in retry_join, or expect fewer", expect-1), summary, b.in(), expect, all, others)
	case all >= 2*expect:
		b.d.fault(at.at, fmt.Sprintf("name %d others at most (this sidecar is known by %s), or expect more", 2*expect-2, b.f.Address),
			summary+": two groups of %d could begin a store each", b.in(), expect, all, others, expect)
	}
}

func (b *federationBlock) reap() {
	if !b.ofThePrimary("reap") {
		return
	}
	b.f.Reap = defaultReap
	v, at := b.typed("reap", cty.String, "a string", `reap = "72h"`)
	if !at.ok {
		return
	}
	reap, err := time.ParseDuration(v.AsString())
	switch {
	case err != nil:
		b.d.fault(at.at, `write hours or minutes, such as reap = "72h" or "90m"`, "reap%s is %q, which is no duration", b.in(), v.AsString())
	case reap < minReap || reap > maxReap:
		b.d.fault(at.at, `from "10m" to "8760h", such as reap = "72h"`, "reap%s is %q", b.in(), v.AsString())
	default:
		b.f.Reap = reap
	}
}

// gatewayFederation reads the block of a gateway.
func (d *decoder) gatewayFederation(root *block, g *Gateway, tls bool) {
	g.Federation = d.federation(root, g.Datacenter, func(b *federationBlock) {
		const whose = "it is for sidecars of the primary datacenter, which keep the store"
		b.elsewhere = map[string]string{"bootstrap_expect": whose, "reap": whose}
		var open bool
		if b.f.Address, open = b.ownAddress("address", g.Listen.Address); open {
			d.fault(b.at, `add address = "10.71.0.1:8443", what this datacenter dials`,
				"address is missing%s, and others cannot dial %s, where the gateway listens", b.in(), g.Listen.Address)
		}
		b.f.WANAddress, _ = b.ownAddress("wan_address", b.f.Address)
		b.retryJoin()
		b.waysOfGateway(g)
		if !tls {
			d.fault(b.at, "add a tls block: `culvert tls cert create --gateway` makes what goes into it",
				"federation needs a certificate of role gateway, and the tls block is missing")
		}
	})
}

// waysOfGateway checks that a gateway finds the store.
func (b *federationBlock) waysOfGateway(g *Gateway) {
	switch {
	case b.is == primary && len(b.f.RetryJoin) == 0 && !slices.ContainsFunc(g.Sidecars, g.mayServe):
		b.d.fault(b.at, `add retry_join = ["10.71.0.11:8443"], sidecars of this datacenter`,
			"retry_join is missing%s, and there is no sidecar block of domain %q", b.in(), g.Domain)
	case b.is == secondary && len(b.f.PrimaryGateways) == 0 &&
		!slices.ContainsFunc(g.Datacenters, func(dc Datacenter) bool { return dc.Name == b.f.PrimaryDatacenter }):
		b.d.fault(b.at, fmt.Sprintf(`add primary_gateways = ["gw.%s.example:8443"] to it, or a block datacenter %[1]q with gateways`, b.f.PrimaryDatacenter),
			"nothing leads to the primary datacenter, %s", b.f.PrimaryDatacenter)
	}
}

// mayServe tells whether a sidecar block may lead to the store: a sidecar of
// another domain does not take this gateway's certificate. One whose domain is
// faulty is not counted out, for that has been told.
func (g *Gateway) mayServe(s GatewaySidecar) bool {
	return s.Domain == g.Domain || !slices.Contains(g.Domains, s.Domain)
}
