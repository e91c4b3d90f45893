package config

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
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
	if len(s) > 200 { // room for .server.<dc>.<domain> in 253
		return fmt.Sprintf("has %d characters, at most 200 are allowed", len(s))
	}
	return ""
}

// labels checks a name of one DNS label or more.
func (d *decoder) labels(what, s string, at hcl.Range) {
	if bad := badLabels(s); bad != "" {
		d.fault(at, labelHint, "%s %q %s", what, s, bad)
	}
}

// identity reads the three names that a certificate carries.
func (b *block) identity(domainDefault string) (datacenter, domain string) {
	datacenter, at := b.required("datacenter", "dc1")
	if datacenter != "" {
		b.d.datacenterName(datacenter, at.at)
	}
	domain, at = b.text("domain")
	if !at.set {
		return datacenter, domainDefault
	}
	b.d.labels("domain", domain, at.at)
	return datacenter, domain
}

// ip reads an address that stands for one host; the zero Addr where it is not
// set or faulty.
func (b *block) ip(key, wildcardHint string) (netip.Addr, value) {
	before := len(b.d.faults)
	s, at := b.text(key)
	if !at.set || len(b.d.faults) > before {
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
	case a.IsUnspecified():
		b.d.fault(at.at, wildcardHint, "%s%s is %s, which stands for every address", key, b.in(), s)
		return netip.Addr{}, at
	}
	return a, at
}

// hostPort completes and checks an address of Culvert's own.
func (d *decoder) hostPort(what, s, port string, at hcl.Range) string {
	full := s
	if _, _, err := net.SplitHostPort(s); err != nil {
		full = net.JoinHostPort(strings.Trim(s, "[]"), port)
	}
	host, p, err := net.SplitHostPort(full)
	if err == nil {
		err = badHost(host)
	}
	if err == nil {
		err = badPort(p)
	}
	if err != nil {
		d.fault(at, fmt.Sprintf("write it as host:port, such as 10.71.0.1:%s", port), "%s is %q: %v", what, s, err)
		return ""
	}
	return full
}

func badHost(host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	if bad := badLabels(strings.TrimSuffix(strings.ToLower(host), ".")); bad != "" {
		return fmt.Errorf("the host %s", bad)
	}
	if digits.MatchString(host) {
		return fmt.Errorf("%s is no IP address", host)
	}
	return nil
}

func badPort(p string) error {
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 && p != "0" {
		return fmt.Errorf("the port %q is not a number from 1 to 65535", p)
	}
	return nil
}

var (
	digits      = regexp.MustCompile(`^[0-9.]+$`)
	serviceName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
)

// address reads an address of Culvert's own. A flag wins over it.
func (b *block) address(key, port, override, flagName string) (string, value) {
	s, at := b.text(key)
	if override != "" {
		return b.d.hostPort(flagName, override, port, flag(flagName)), value{at: flag(flagName), set: true}
	}
	if !at.set || s == "" {
		if at.set && s == "" {
			b.d.fault(at.at, "write it as host:port", "%s%s is empty", key, b.in())
		}
		return "", at
	}
	return b.d.hostPort(key+b.in(), s, port, at.at), at
}

// gatewayList reads a list of gateways.
func (b *block) gatewayList() []string {
	items, _ := b.list("gateways")
	var out []string
	seen := make(map[string]bool)
	for _, it := range items {
		address := b.d.hostPort("a gateway"+b.in(), it.text, defaultPort, it.at)
		if address == "" {
			continue
		}
		if seen[address] {
			b.d.fault(it.at, "take one away", "the gateway %s is given twice%s", address, b.in())
			continue
		}
		seen[address] = true
		out = append(out, address)
	}
	return out
}

// listen, admin and log read the blocks that sidecars and gateways have alike.
func (b *block) listen(l *Listen, passthrough bool) {
	o := b.d.o.Overrides
	found := b.one("listen", func(in *block) {
		var at value
		l.Address, at = in.address("address", defaultPort, o.Listen, "--listen")
		if !at.set {
			b.d.fault(in.at, `add address = "10.71.0.11:8443"`, "address is missing in listen")
		}
		if passthrough {
			l.Passthrough, _ = in.address("passthrough", "", "", "")
		}
	})
	switch {
	case found != nil:
	case o.Listen != "":
		l.Address = b.d.hostPort("--listen", o.Listen, defaultPort, flag("--listen"))
	default:
		b.d.fault(b.at, `add listen { address = "10.71.0.11:8443" }`, "the listen block is missing")
	}
}

func (b *block) admin(a *Admin) {
	o := b.d.o.Overrides
	found := b.one("admin", func(in *block) { a.Address, _ = in.address("address", defaultAdminPort, o.Admin, "--admin") })
	if found == nil && o.Admin != "" {
		a.Address = b.d.hostPort("--admin", o.Admin, defaultAdminPort, flag("--admin"))
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
	for _, f := range []struct {
		name, value string
		words       []string
		to          *string
	}{{"--log-level", b.d.o.Overrides.LogLevel, levels, &l.Level}, {"--log-format", b.d.o.Overrides.LogFormat, formats, &l.Format}} {
		if f.value == "" {
			continue
		}
		*f.to = f.value
		for _, w := range f.words {
			if w == f.value {
				f.value = ""
			}
		}
		if f.value != "" {
			b.d.fault(flag(f.name), didYouMean(f.value, f.words), "%q is given", f.value)
		}
	}
}
