package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The limits of RFC 1035 section 2.3.4, in bytes.
const (
	maxName  = 253 // in the text form, without the final dot
	maxLabel = 63
)

// An Identity is who the holder of a certificate is. Node is empty where the
// names tell none: any server of the datacenter, or a wildcard.
type Identity struct {
	Datacenter string
	Node       string
	Role       Role
}

// String returns "dc/node", or "dc/*" without a node.
func (id Identity) String() string {
	if id.Node == "" {
		return id.Datacenter + "/*"
	}
	return id.Datacenter + "/" + id.Node
}

// Name returns the DNS name of the identity, in lower case; [ParseName] is its
// inverse.
func (id Identity) Name(domain string) string {
	name := string(id.Role) + "." + id.Datacenter + "." + domain
	if id.Node != "" {
		name = id.Node + "." + name
	}
	return lowerASCII(name)
}

// names are the DNS names that a certificate of the identity needs.
func (id Identity) names(domain string) []string {
	anyNode := Identity{Datacenter: id.Datacenter, Role: id.Role}
	if id.Node == "" {
		return []string{anyNode.Name(domain)}
	}
	return []string{id.Name(domain), anyNode.Name(domain)}
}

// ServerName returns the name to dial: <node>.server.<dc>.<domain>, or
// server.<dc>.<domain>, any server of the datacenter, if node is empty.
func ServerName(node, dc, domain string) string {
	return Identity{Datacenter: dc, Node: node, Role: RoleServer}.Name(domain)
}

// ParseName returns the identity that a DNS name stands for. Case does not
// matter; the identity is in lower case. A name that DNS does not allow (RFC 1123
// section 2.1: letters, digits and hyphens), a wildcard among them, is an error, and so is
// one outside the scheme of the domain.
func ParseName(name, domain string) (Identity, error) {
	name, domain = lowerASCII(name), lowerASCII(domain)
	if err := checkName(name); err != nil {
		return Identity{}, err
	}
	rest, ok := strings.CutSuffix(name, "."+domain)
	if !ok || domain == "" {
		return Identity{}, fmt.Errorf("name %q is not in domain %q", name, domain)
	}
	labels := strings.Split(rest, ".")
	last := len(labels) - 1
	if last < 1 || !slices.Contains(roles(), Role(labels[last-1])) {
		return Identity{}, fmt.Errorf("name %q is not like [<node>.]server.<dc>.%s", name, domain)
	}
	return Identity{
		Datacenter: labels[last],
		Node:       strings.Join(labels[:last-1], "."),
		Role:       Role(labels[last-1]),
	}, nil
}

// IdentityOf returns who the names of a certificate say its holder is. It
// verifies nothing. The error is a [*PeerError] with reason no_names,
// other_domain or conflicting_names.
//
// A wildcard, "*.server.dc1.consul", fits every node, so it tells none. Names with
// and without a node go together, as they do in Consul's certificates.
func IdentityOf(cert *x509.Certificate, domain string) (Identity, error) {
	var (
		found   Identity
		foreign bool
	)
	for _, name := range cert.DNSNames {
		base, wildcard := strings.CutPrefix(lowerASCII(name), "*.")
		id, err := ParseName(base, domain)
		if err != nil {
			foreign = foreign || hasShape(base)
			continue
		}
		if wildcard {
			id.Node = ""
		}
		if found.Role != "" && !found.agrees(id) {
			return Identity{}, &PeerError{
				Reason: ReasonConflictingNames,
				Wanted: "the names of one node, in one datacenter and one role",
				Found:  describe(cert),
			}
		}
		id.Node = max(id.Node, found.Node) // one of them is empty, or they are the same
		found = id
	}
	if found.Role != "" {
		return found, nil
	}
	refusal := &PeerError{Reason: ReasonNoNames, Wanted: "a name like <node>.server.<dc>." + lowerASCII(domain), Found: describe(cert)}
	if foreign {
		refusal.Reason = ReasonOtherDomain
	}
	return Identity{}, refusal
}

// agrees tells whether both can be the identity of one holder.
func (id Identity) agrees(other Identity) bool {
	return id.Role == other.Role && id.Datacenter == other.Datacenter &&
		(id.Node == other.Node || id.Node == "" || other.Node == "")
}

// hasShape tells whether a name would be in the scheme if the domain were
// another.
func hasShape(name string) bool {
	labels := strings.Split(name, ".")
	for i, label := range labels {
		if slices.Contains(roles(), Role(label)) && len(labels)-i > 2 {
			return checkName(name) == nil
		}
	}
	return false
}

// checkName tells what is wrong with a DNS name in lower case, by the rules for host names.
func checkName(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("a name of %d bytes is longer than the %d of DNS", len(name), maxName)
	}
	for label := range strings.SplitSeq(name, ".") {
		if err := checkLabel(label); err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
	}
	return nil
}

func checkLabel(label string) error {
	switch {
	case label == "":
		return errors.New("a label is empty")
	case len(label) > maxLabel:
		return fmt.Errorf("label %q has %d bytes, more than the %d of DNS", label, len(label), maxLabel)
	case label[0] == '-' || label[len(label)-1] == '-':
		return fmt.Errorf("label %q begins or ends with a hyphen", label)
	}
	for _, r := range label {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return fmt.Errorf("label %q has %q, which DNS does not allow", label, r)
		}
	}
	return nil
}

// lowerASCII leaves what is not ASCII as it is: strings.ToLower makes a plain k
// of the Kelvin sign, which would then pass for a name that it is not.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, s)
}
