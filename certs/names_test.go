package certs

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
)

// nameSeeds are the cases of TestParseName and the seeds of FuzzParseName.
func nameSeeds() []nameSeed {
	long := strings.Repeat("a", maxLabel)
	return []nameSeed{
		{"bob.server.dc1.consul", "consul", Identity{"dc1", "bob", RoleServer}, ""},
		{"server.dc1.consul", "consul", Identity{"dc1", "", RoleServer}, ""},
		{"Bob.Server.DC1.Consul", "CONSUL", Identity{"dc1", "bob", RoleServer}, ""},
		{"rack1.bob.server.dc1.consul", "consul", Identity{"dc1", "rack1.bob", RoleServer}, ""},
		{"gw1.gateway.dc2.example.org", "example.org", Identity{"dc2", "gw1", RoleGateway}, ""},
		{"client.dc1.consul", "consul", Identity{"dc1", "", RoleClient}, ""},
		{"server.server.server.consul", "consul", Identity{"server", "server", RoleServer}, ""},
		{"a.gateway.server.dc1.consul", "consul", Identity{"dc1", "a.gateway", RoleServer}, ""},
		{long + ".server.dc1.consul", "consul", Identity{"dc1", long, RoleServer}, ""},

		{"", "consul", Identity{}, "a label is empty"},
		{"localhost", "consul", Identity{}, "not in domain"},
		{"consul", "consul", Identity{}, "not in domain"},
		{"dc1.consul", "consul", Identity{}, "is not like"},
		{"server.consul", "consul", Identity{}, "is not like"},
		{"bob.agent.dc1.consul", "consul", Identity{}, "is not like"},
		{"bob.server.dc1.nomad", "consul", Identity{}, "not in domain"},
		{"bob.server.dc1.xconsul", "consul", Identity{}, "not in domain"},
		{"server.dc1.consul", "", Identity{}, "not in domain"},
		{"*.server.dc1.consul", "consul", Identity{}, "which DNS does not allow"},
		{"b_b.server.dc1.consul", "consul", Identity{}, "'_', which DNS does not allow"},
		{"bób.server.dc1.consul", "consul", Identity{}, "'ó', which DNS does not allow"},
		{"\u212aate.server.dc1.consul", "consul", Identity{}, "which DNS does not allow"}, // the Kelvin sign
		{"bob\n.server.dc1.consul", "consul", Identity{}, `'\n', which DNS does not allow`},
		{"-bob.server.dc1.consul", "consul", Identity{}, "hyphen"},
		{"bob-.server.dc1.consul", "consul", Identity{}, "hyphen"},
		{"bob..server.dc1.consul", "consul", Identity{}, "a label is empty"},
		{".server.dc1.consul", "consul", Identity{}, "a label is empty"},
		{"server.dc1.consul.", "consul", Identity{}, "a label is empty"},
		{long + "a.server.dc1.consul", "consul", Identity{}, "more than the 63"},
		{strings.Repeat("a.", 120) + "server.dc1.consul", "consul", Identity{}, "longer than the 253"},
	}
}

type nameSeed struct {
	name, domain string
	want         Identity
	err          string // part of the error; empty for none
}

func TestParseName(t *testing.T) {
	for _, c := range nameSeeds() {
		got, err := ParseName(c.name, c.domain)
		switch {
		case c.err == "" && (err != nil || got != c.want):
			t.Errorf("ParseName(%q, %q) = %+v, %v; want %+v", c.name, c.domain, got, err, c.want)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("ParseName(%q, %q) = %+v, %v; want an error with %q", c.name, c.domain, got, err, c.err)
		}
	}
}

// FuzzParseName holds two properties. A name that is parsed is rebuilt from its
// identity, in lower case. And what [ServerName] builds from a node, a datacenter
// and a domain that DNS allows is parsed to these, if it is not too long.
func FuzzParseName(f *testing.F) {
	for _, c := range nameSeeds() {
		f.Add(c.name, "bob", "dc1", c.domain)
		f.Add("bob.server.dc1.consul", c.name, strings.ReplaceAll(c.name, ".", "-"), c.domain)
	}
	f.Fuzz(func(t *testing.T, name, node, dc, domain string) {
		if id, err := ParseName(name, domain); err == nil {
			if back := id.Name(domain); back != lowerASCII(name) {
				t.Fatalf("%q is %+v, which is %q", name, id, back)
			}
			if checkLabel(id.Datacenter) != nil || id.Node != "" && checkName(id.Node) != nil {
				t.Fatalf("%q is %+v, which no DNS name can be", name, id)
			}
		}
		node, dc, domain = lowerASCII(node), lowerASCII(dc), lowerASCII(domain)
		built := ServerName(node, dc, domain)
		if checkLabel(dc) != nil || node != "" && checkName(node) != nil || checkName(domain) != nil || len(built) > maxName {
			return
		}
		want := Identity{Datacenter: dc, Node: node, Role: RoleServer}
		if id, err := ParseName(built, domain); err != nil || id != want {
			t.Fatalf("%q is %+v, %v; want %+v", built, id, err, want)
		}
	})
}

func TestIdentityOf(t *testing.T) {
	bob := Identity{"dc1", "bob", RoleServer}
	anyServer := Identity{"dc1", "", RoleServer}
	cases := []struct {
		names  string
		want   Identity
		reason string
	}{
		// The shapes that Consul makes.
		{"server.dc1.consul bob.server.dc1.consul localhost", bob, ""},
		{"bob.server.dc1.consul server.dc1.consul localhost", bob, ""},
		{"*.server.dc1.consul", anyServer, ""},
		{"server.dc1.consul localhost", anyServer, ""},
		{"client.dc1.consul localhost", Identity{"dc1", "", RoleClient}, ""},

		{"BOB.SERVER.DC1.CONSUL", bob, ""},
		{"bob.server.dc1.consul *.server.dc1.consul", bob, ""},
		{"*.rack1.server.dc1.consul", anyServer, ""},
		{"gw1.gateway.dc1.consul gateway.dc1.consul", Identity{"dc1", "gw1", RoleGateway}, ""},
		{"bob.server.dc1.consul bob.server.dc1.nomad web.example.org", bob, ""},
		{"bob.server.dc1.consul bad_name.server.dc2.consul", bob, ""},

		{"", Identity{}, ReasonNoNames},
		{"localhost", Identity{}, ReasonNoNames},
		{"*", Identity{}, ReasonNoNames},
		{"web.dc1.consul", Identity{}, ReasonNoNames},
		{"server.consul", Identity{}, ReasonNoNames},
		{"bob.server.dc1.nomad server.dc1.nomad localhost", Identity{}, ReasonOtherDomain},
		{"*.server.dc1.nomad", Identity{}, ReasonOtherDomain},
		{"bob.server.dc1.consul amy.server.dc1.consul", Identity{}, ReasonConflictingNames},
		{"bob.server.dc1.consul bob.server.dc2.consul", Identity{}, ReasonConflictingNames},
		{"server.dc1.consul server.dc2.consul", Identity{}, ReasonConflictingNames},
		{"bob.server.dc1.consul bob.gateway.dc1.consul", Identity{}, ReasonConflictingNames},
		{"server.dc1.consul client.dc1.consul", Identity{}, ReasonConflictingNames},
		// The two nodes are not neighbours.
		{"bob.server.dc1.consul server.dc1.consul amy.server.dc1.consul", Identity{}, ReasonConflictingNames},
	}
	for _, c := range cases {
		got, err := IdentityOf(&x509.Certificate{DNSNames: strings.Fields(c.names)}, "consul")
		refusal, _ := errors.AsType[*PeerError](err)
		switch {
		case c.reason == "" && (err != nil || got != c.want):
			t.Errorf("names %q are %+v, %v; want %+v", c.names, got, err, c.want)
		case c.reason != "" && (refusal == nil || refusal.Reason != c.reason):
			t.Errorf("names %q are %+v, %v; want reason %s", c.names, got, err, c.reason)
		case c.reason != "" && c.names != "":
			for name := range strings.FieldsSeq(c.names) {
				if !strings.Contains(refusal.Found, name) {
					t.Errorf("names %q: %q does not print %s", c.names, refusal.Found, name)
				}
			}
		}
	}
}

func TestIdentityStrings(t *testing.T) {
	bob := Identity{"dc1", "bob", RoleServer}
	if got := bob.String(); got != "dc1/bob" {
		t.Errorf("String() = %q", got)
	}
	bob.Node = ""
	if got := bob.String(); got != "dc1/*" {
		t.Errorf("String() without a node = %q", got)
	}
	if got := ServerName("", "dc1", "consul"); got != "server.dc1.consul" {
		t.Errorf("ServerName without a node = %q", got)
	}
}

// A stranger's names must not make more of a log line than one line of a bounded length.
func TestDescribeIsOneBoundedLine(t *testing.T) {
	cert := &x509.Certificate{DNSNames: []string{"a\nb", "x, y", strings.Repeat("n", 10000)}}
	for range 10000 {
		cert.DNSNames = append(cert.DNSNames, "evil\x1b[31m.example.org")
	}
	got := describe(cert)
	if strings.ContainsAny(got, "\n\x1b") || len(got) > 2*maxFound {
		t.Errorf("%d bytes: %.200q", len(got), got)
	}
	if !strings.HasPrefix(got, `names "a\nb", "x, y", "nnn`) || !strings.HasSuffix(got, " more") {
		t.Errorf("got %.80s ... %s", got, got[len(got)-80:])
	}
}
