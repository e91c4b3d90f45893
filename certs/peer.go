package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The reasons for which a peer's certificate is refused, see [PeerError].
const (
	ReasonOtherCA          = "other_ca"          // issued by none of the CAs of the bundle, whatever else is wrong with it
	ReasonExpired          = "expired"           // it, or the CA above it
	ReasonNotYetValid      = "not_yet_valid"     // likewise
	ReasonKeyUsage         = "key_usage"         // not for authentication in this direction
	ReasonOtherDomain      = "other_domain"      // names of the scheme, all in another domain
	ReasonNoNames          = "no_names"          // no name of the scheme in any domain
	ReasonConflictingNames = "conflicting_names" // two roles, datacenters or nodes
	ReasonRole             = "role"              // a good certificate of a role that is not admitted here
	ReasonDatacenter       = "datacenter"        // a good certificate of another datacenter, for a protocol that stays within one
	ReasonNameMismatch     = "name_mismatch"     // a good certificate of another server than the one dialled
	ReasonNoCertificate    = "no_certificate"    // a client that sent none
	ReasonBadCertificate   = "bad_certificate"   // anything else that x509 objects to
)

// Reasons returns every value that PeerError.Reason can have.
func Reasons() []string {
	return []string{
		ReasonOtherCA, ReasonExpired, ReasonNotYetValid, ReasonOtherDomain, ReasonKeyUsage, ReasonRole, ReasonDatacenter,
		ReasonNoNames, ReasonConflictingNames, ReasonNoCertificate, ReasonBadCertificate, ReasonNameMismatch,
	}
}

// A PeerError says why a peer's certificate was refused. Reason is one of
// [Reasons]. Wanted and Found are for people, on one line, without control
// characters, and the same each time for the same certificate at the same
// second:
//
//	reason             wanted                                                found
//	other_ca           issued by "CN=..." (key id ab:cd) [or "CN=..." ...]   issued by "CN=..." (key id 01:23), NAMES
//	expired            valid at 2026-01-02T15:04:05Z                         expired 2025-12-31T00:00:00Z, NAMES
//	not_yet_valid      valid at 2026-01-02T15:04:05Z                         not valid before 2027-01-01T00:00:00Z, NAMES
//	key_usage          extended key usage clientAuth                         extended key usage serverAuth, NAMES
//	no_names           a name like <node>.server.<dc>.consul                 NAMES
//	other_domain       a name like <node>.server.<dc>.consul                 NAMES
//	conflicting_names  the names of one node, in one datacenter and one role NAMES
//	role               role server [or gateway]                              role gateway, NAMES
//	datacenter         datacenter dc1                                        datacenter dc2, NAMES
//	name_mismatch      name bob.server.dc2.consul                            NAMES
//	no_certificate     a certificate issued by "CN=..." ...                  no certificate
//	bad_certificate    a certificate that can be verified                    x509's words, NAMES
//
// NAMES are the DNS names in the order of the certificate: "names a, b", or
// "no names". If it is the CA that is out of its time, `CA "CN=..." ` comes before expired
// or not valid. The words are kept stable; tools should use Reason.
type PeerError struct {
	Reason string
	Wanted string
	Found  string
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("certificate refused (%s): wanted %s; found %s", e.Reason, e.Wanted, e.Found)
}

// maxFound bounds what one certificate of a stranger can write into a log line, in bytes.
const maxFound = 4096

// describe names a certificate by what it says, in printable characters.
func describe(cert *x509.Certificate) string {
	if len(cert.DNSNames) == 0 {
		return "no names"
	}
	var b strings.Builder
	b.WriteString("names ")
	for i, name := range cert.DNSNames {
		if b.Len() > maxFound {
			fmt.Fprintf(&b, " and %d more", len(cert.DNSNames)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(printable(name))
	}
	return b.String()
}

// printable returns s as it is if it can be nothing but one word, and quoted and cut if not.
func printable(s string) string {
	if quoted := quote(s); quoted != `"`+s+`"` || strings.ContainsAny(s, " ,") {
		return quoted
	}
	return s
}

func quote(s string) string {
	const most = 256
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.QuoteToASCII(s)
}

// keyID prints the key identifier of RFC 5280 section 4.2.1.2 as openssl does:
// it is what tells a CA from another of the same name.
func keyID(id []byte) string {
	if len(id) == 0 {
		return "no key id"
	}
	return "key id " + hexID(id)
}

func hexID(id []byte) string {
	return strings.ReplaceAll(fmt.Sprintf("% x", id[:min(len(id), 32)]), " ", ":")
}

func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func usageName(u x509.ExtKeyUsage) string {
	switch u {
	case x509.ExtKeyUsageServerAuth:
		return "serverAuth"
	case x509.ExtKeyUsageClientAuth:
		return "clientAuth"
	case x509.ExtKeyUsageAny:
		return "any"
	default:
		return "other"
	}
}

// usages prints the extended key usages. A certificate without the extension
// may be used for anything (RFC 5280 section 4.2.1.12).
func usages(cert *x509.Certificate) string {
	if len(cert.ExtKeyUsage) == 0 && len(cert.UnknownExtKeyUsage) == 0 {
		return "any"
	}
	var all []string
	for _, u := range cert.ExtKeyUsage {
		all = append(all, usageName(u))
	}
	if len(cert.UnknownExtKeyUsage) > 0 {
		all = append(all, "other")
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ", ")
}

// A trust is the CA bundle.
type trust struct {
	pool  *x509.CertPool
	cas   []*x509.Certificate
	known *known
}

func newTrust(cas []*x509.Certificate) trust {
	t := trust{pool: x509.NewCertPool(), cas: cas, known: &known{chains: make(map[chainKey]validity)}}
	for _, ca := range cas {
		t.pool.AddCert(ca)
	}
	return t
}

// String says who must have issued a certificate.
func (t trust) String() string {
	var all []string
	for _, ca := range t.cas {
		all = append(all, fmt.Sprintf("%s (%s)", quote(ca.Subject.String()), keyID(ca.SubjectKeyId)))
	}
	return "issued by " + strings.Join(all, " or ")
}

// verify verifies that chain, leaf first, leads to the bundle at a time and for
// a use, and returns the paths. The error is a [*PeerError].
func (t trust) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) ([][]*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, &PeerError{Reason: ReasonNoCertificate, Wanted: "a certificate " + t.String(), Found: "no certificate"}
	}
	opts := x509.VerifyOptions{
		Roots:         t.pool,
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	paths, err := chain[0].Verify(opts)
	if err != nil {
		return nil, t.refusal(err, chain[0], opts)
	}
	return paths, nil
}

// refusal turns what x509 says into a PeerError.
func (t trust) refusal(err error, leaf *x509.Certificate, opts x509.VerifyOptions) *PeerError {
	now, usage := opts.CurrentTime, opts.KeyUsages[0]

	// x509 looks at the dates first. A stranger's certificate is a stranger's
	// even where it has also expired, and its dates are of no interest.
	opts.CurrentTime, opts.KeyUsages = leaf.NotAfter, []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	_, timeless := leaf.Verify(opts)
	if _, stranger := errors.AsType[x509.UnknownAuthorityError](timeless); stranger {
		return &PeerError{
			Reason: ReasonOtherCA,
			Wanted: t.String(),
			Found:  fmt.Sprintf("issued by %s (%s), %s", quote(leaf.Issuer.String()), keyID(leaf.AuthorityKeyId), describe(leaf)),
		}
	}
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	switch {
	case ok && invalid.Reason == x509.Expired:
		which := ""
		if !invalid.Cert.Equal(leaf) {
			which = "CA " + quote(invalid.Cert.Subject.String()) + " "
		}
		refusal := &PeerError{Reason: ReasonExpired, Wanted: "valid at " + timestamp(now)}
		if now.Before(invalid.Cert.NotBefore) {
			refusal.Reason = ReasonNotYetValid
			refusal.Found = fmt.Sprintf("%snot valid before %s, %s", which, timestamp(invalid.Cert.NotBefore), describe(leaf))
		} else {
			refusal.Found = fmt.Sprintf("%sexpired %s, %s", which, timestamp(invalid.Cert.NotAfter), describe(leaf))
		}
		return refusal
	case ok && invalid.Reason == x509.IncompatibleUsage:
		return &PeerError{
			Reason: ReasonKeyUsage,
			Wanted: "extended key usage " + usageName(usage),
			Found:  "extended key usage " + usages(leaf) + ", " + describe(leaf),
		}
	}
	return &PeerError{
		Reason: ReasonBadCertificate,
		Wanted: "a certificate that can be verified",
		Found:  printable(err.Error()) + ", " + describe(leaf),
	}
}
