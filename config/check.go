package config

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// badLabel says what is wrong with one DNS label (RFC 1123 section 2.1, in
// lower case); "" if nothing is.
func badLabel(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > 63:
		return fmt.Sprintf("has %d characters, at most 63 are allowed", len(s))
	case s[0] == '-' || s[len(s)-1] == '-':
		return `begins or ends with "-"`
	}
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-':
		case r >= 'A' && r <= 'Z':
			return fmt.Sprintf("has the capital letter %q", r)
		default:
			return fmt.Sprintf("has the character %q", r)
		}
	}
	return ""
}

const labelHint = `names become DNS names: use a-z, 0-9 and "-"`

// datacenterName checks a name of one DNS label.
func (d *decoder) datacenterName(s string, at hcl.Range) {
	if bad := badLabel(s); bad != "" {
		hint := labelHint
		if strings.Contains(s, ".") && badLabels(s) == "" {
			hint = "a datacenter is one DNS label, without dots"
		}
		d.fault(at, hint, "datacenter %q %s", s, bad)
	}
}

func badLabels(s string) string {
	for part := range strings.SplitSeq(s, ".") {
		if bad := badLabel(part); bad != "" {
			return bad
		}
	}
	if len(s) > maxName {
		return fmt.Sprintf("has %d characters, at most %d are allowed", len(s), maxName)
	}
	return ""
}

// labels checks a name of one DNS label or more.
func (d *decoder) labels(what, s string, at hcl.Range) {
	if bad := badLabels(s); bad != "" {
		d.fault(at, labelHint, "%s %q %s", what, s, bad)
	}
}

// maxName bounds a DNS name in its text form (RFC 1035 section 2.3.4).
const maxName = 253

// The roles that a certificate's names tell.
const (
	roleServer  = "server"
	roleGateway = "gateway"
)

// fits checks that the name of a node, which is well by itself, can be put
// together.
func (d *decoder) fits(node, role, datacenter, domain string, at hcl.Range) {
	name := node + "." + role + "." + datacenter + "." + domain
	if badLabels(node) == "" && badLabel(datacenter) == "" && badLabels(domain) == "" && len(name) > maxName {
		d.fault(at, fmt.Sprintf("at most %d are allowed", maxName), "the name %s has %d characters", name, len(name))
	}
}

// identity reads the three names that a certificate carries.
func (b *block) identity(domainDefault string) (datacenter, domain string) {
	datacenter, at := b.required("datacenter", "dc1")
	if at.ok {
		b.d.datacenterName(datacenter, at.at)
	}
	domain, at = b.text("domain")
	if !at.ok {
		return datacenter, domainDefault
	}
	b.d.labels("domain", domain, at.at)
	return datacenter, domain
}

// ip reads an address that stands for one host; the zero Addr where it is not
// set or faulty.
func (b *block) ip(key, wildcardHint string) (netip.Addr, value) {
	s, at := b.text(key)
	if !at.ok {
		return netip.Addr{}, at
	}
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		b.d.fault(at.at, "an IP address without a port, such as 127.77.1.1", "%s%s is %q, which is no IP address", key, b.in(), s)
		return netip.Addr{}, at
	case a.Zone() != "" || a.Is4In6():
		b.d.fault(at.at, "write it without a zone or mapping", "%s%s is %q", key, b.in(), s)
		return netip.Addr{}, at
	case a.IsMulticast():
		b.d.fault(at.at, "give the address of one server", "%s%s is %s, which stands for a group", key, b.in(), s)
		return netip.Addr{}, at
	case a.IsUnspecified():
		b.d.fault(at.at, wildcardHint, "%s%s is %s, which stands for every address", key, b.in(), s)
		return netip.Addr{}, at
	}
	return a, at
}

// A use says what an address of Culvert's own is for.
type use struct {
	port    string // where it names none; "" if it has to
	listens bool   // every address of the host and a free port will do
}

// hostPort completes and checks an address of Culvert's own; "" if it is faulty.
func (d *decoder) hostPort(what, s string, u use, at hcl.Range) string {
	host, port, err := splitHostPort(s, u.port)
	if err == nil {
		host, err = u.host(host)
	}
	if err == nil {
		port, err = u.number(port)
	}
	if err != nil {
		d.fault(at, "write it as host:port, such as 10.71.0.1:"+cmp.Or(u.port, "8300"), "%s is %q: %v", what, s, err)
		return ""
	}
	return net.JoinHostPort(host, port)
}

func splitHostPort(s, port string) (string, string, error) {
	if host, p, err := net.SplitHostPort(s); err == nil {
		return host, p, nil
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		if s, ok = strings.CutSuffix(inner, "]"); !ok {
			return "", "", errors.New("a bracket is missing")
		}
	}
	if port == "" {
		return "", "", errors.New("it has no port")
	}
	return s, port, nil
}

func (u use) host(host string) (string, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Unmap().IsUnspecified() && !u.listens {
			return "", errors.New("it stands for every address, and one is needed to dial")
		}
		return a.String(), nil
	}
	if bad := badLabels(strings.TrimSuffix(strings.ToLower(host), ".")); bad != "" {
		return "", fmt.Errorf("the host %s", bad)
	}
	if digits.MatchString(host) {
		return "", fmt.Errorf("%s is no IP address", host)
	}
	return host, nil
}

func (u use) number(port string) (string, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 && !u.listens {
		return "", fmt.Errorf("the port %q is not a number from 1 to 65535", port)
	}
	return strconv.FormatUint(n, 10), nil
}

var (
	digits      = regexp.MustCompile(`^[0-9.]+$`)
	serviceName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
)

// address reads an address of Culvert's own. A flag wins over it.
func (b *block) address(key string, u use, override, flagName string) (string, value) {
	s, at := b.text(key)
	full := ""
	if at.ok {
		full = b.d.hostPort(key+b.in(), s, u, at.at)
	}
	if override != "" {
		return b.d.hostPort("the address", override, u, flag(flagName)), value{at: flag(flagName), set: true, ok: true}
	}
	return full, at
}

// addresses reads a list of addresses, each completed and checked by parse. One
// in which everything is faulty counts as an address, so that what follows from
// it is not told as well.
func (b *block) addresses(key, noun string, parse func(what string, it item) string) []string {
	before := len(b.d.faults)
	items, _ := b.list(key)
	var out []string
	for _, it := range items {
		address := parse("a "+noun+b.in(), it)
		switch {
		case address == "":
		case slices.ContainsFunc(out, func(o string) bool { return sameAddress(o, address) }):
			b.d.fault(it.at, "take one away", "the %s %s is given twice%s", noun, address, b.in())
		default:
			out = append(out, address)
		}
	}
	if out == nil && len(b.d.faults) > before {
		return []string{""}
	}
	return out
}

func (b *block) gatewayList() []string {
	return b.addresses("gateways", "gateway", b.d.listed)
}

// listed reads an address of Culvert's own in a list.
func (d *decoder) listed(what string, it item) string {
	return d.hostPort(what, it.text, use{port: defaultPort}, it.at)
}

// sameAddress compares two addresses as DNS compares names.
func sameAddress(a, b string) bool {
	plain := func(s string) string {
		host, port, err := net.SplitHostPort(s)
		if err != nil { // none of a form that was read
			return s
		}
		return strings.ToLower(strings.TrimSuffix(host, ".") + " " + strings.TrimSuffix(port, "."))
	}
	return plain(a) == plain(b)
}

// listen, admin and log read the blocks that sidecars and gateways have alike.
func (b *block) listen(l *Listen, passthrough bool) {
	o := b.d.o.Overrides
	found := b.one("listen", func(in *block) {
		var at value
		l.Address, at = in.address("address", use{defaultPort, true}, o.Listen, "--listen")
		if !at.set {
			b.d.fault(in.at, `add address = "10.71.0.11:8443"`, "address is missing in listen")
		}
		if passthrough {
			l.Passthrough, _ = in.address("passthrough", use{}, "", "")
			if l.PassthroughTLS = in.boolean("passthrough_tls", false); l.PassthroughTLS && l.Passthrough == "" {
				b.d.fault(in.at, `add passthrough = "127.0.0.1:8300": where the server listens`, "passthrough_tls in listen is true, and passthrough is missing")
			}
		}
	})
	switch {
	case found != nil:
	case o.Listen != "":
		l.Address = b.d.hostPort("the address", o.Listen, use{defaultPort, true}, flag("--listen"))
	default:
		b.d.fault(b.at, `add listen { address = "10.71.0.11:8443" }`, "the listen block is missing")
	}
}

func (b *block) admin(a *Admin) {
	o := b.d.o.Overrides
	found := b.one("admin", func(in *block) { a.Address, _ = in.address("address", use{defaultAdminPort, true}, o.Admin, "--admin") })
	if found == nil && o.Admin != "" {
		a.Address = b.d.hostPort("the address", o.Admin, use{defaultAdminPort, true}, flag("--admin"))
	}
	if a.Address == "" {
		a.Address = defaultAdmin
	}
}

func (b *block) log(l *Log) {
	levels, formats := []string{"debug", "info", "warn", "error"}, []string{"json", "console"}
	l.Level = "info"
	b.one("log", func(in *block) {
		l.Level, _ = in.oneOf("level", "info", levels...)
		l.Format, _ = in.oneOf("format", "", formats...)
	})
	o := b.d.o.Overrides
	b.d.word("--log-level", o.LogLevel, levels, &l.Level)
	b.d.word("--log-format", o.LogFormat, formats, &l.Format)
}

// word takes a flag that is one of a closed set.
func (d *decoder) word(name, given string, words []string, to *string) {
	switch {
	case given == "":
	case slices.Contains(words, given):
		*to = given
	default:
		d.fault(flag(name), didYouMean(given, words), "%q is given", given)
	}
}
