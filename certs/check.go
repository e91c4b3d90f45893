package certs

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// The values of Problem.Field.
const (
	FieldCA   = "ca_file"
	FieldCert = "cert_file"
	FieldKey  = "key_file"
)

// A Problem is one fault of the files of a tls block.
type Problem struct {
	Field   string // which file
	Summary string // what is wrong, in one line
	Hint    string // what would be right; may be empty
}

// A loadError is every fault that kept a [Source] from being loaded.
type loadError []Problem

func (e *loadError) Error() string {
	var all []string
	for _, p := range *e {
		all = append(all, p.Field+": "+p.Summary)
	}
	return strings.Join(all, "; ")
}

// Hint returns what helps against the first fault that something is known to help against.
func (e *loadError) Hint() string {
	for _, p := range *e {
		if p.Hint != "" {
			return p.Hint
		}
	}
	return ""
}

// Check tells all that is wrong with three files for a process that is to be
// want: what is missing, unreadable, readable by others, no PEM, not a pair, of
// other names, out of its time, of another CA, or not for both server and client
// authentication. [Load] refuses the same, save that it takes any identity.
func Check(caFile, certFile, keyFile string, want Identity, domain string) []Problem {
	l := &loader{ca: caFile, cert: certFile, key: keyFile, want: want, domain: domain, now: time.Now()}
	l.load()
	return l.problems
}

// A loader reads the files of one generation and collects what is wrong.
type loader struct {
	ca, cert, key string
	want          Identity // zero: any
	domain        string
	now           time.Time

	problems []Problem
}

func (l *loader) add(field, hint, format string, args ...any) {
	l.problems = append(l.problems, Problem{Field: field, Summary: fmt.Sprintf(format, args...), Hint: hint})
}

// load returns a generation that is good if and only if there are no problems.
func (l *loader) load() *generation {
	g := &generation{sessions: tls.NewLRUClientSessionCache(maxSessions)}
	g.trust = newTrust(l.readCAs())
	g.chain = l.readChain()
	signer := l.readKey()
	if len(g.chain) == 0 {
		return g
	}
	leaf := g.chain[0]
	l.checkDates(leaf)
	l.checkUsages(leaf)
	g.identity = l.checkNames(leaf)
	g.notAfter = l.checkChain(g)
	if signer != nil {
		if !samePublic(leaf.PublicKey, signer.Public()) {
			l.add(FieldKey, "give the key that was made with the certificate", "%s is not the key of %s", l.key, l.cert)
		}
		g.cert = tls.Certificate{PrivateKey: signingKey{&signer}, Leaf: leaf}
		for _, c := range g.chain {
			g.cert.Certificate = append(g.cert.Certificate, c.Raw)
		}
	}
	return g
}

func (l *loader) readCAs() []*x509.Certificate {
	hint := fmt.Sprintf("`culvert tls ca create --domain %s` makes a CA, once for all datacenters; copy its certificate here", l.domain)
	content, ok := l.read(FieldCA, l.ca, hint)
	if !ok {
		return nil
	}
	cas, err := parseCertificates(content)
	if err != nil {
		l.add(FieldCA, hint, "read %s: %v", l.ca, err)
		return nil
	}
	for _, ca := range cas {
		if !ca.IsCA {
			l.add(FieldCA, hint, "%s holds %s, which is not a CA's certificate", l.ca, quote(ca.Subject.String()))
		}
	}
	return cas
}

func (l *loader) readChain() []*x509.Certificate {
	content, ok := l.read(FieldCert, l.cert, l.createHint())
	if !ok {
		return nil
	}
	chain, err := parseCertificates(content)
	if err != nil {
		l.add(FieldCert, l.createHint(), "read %s: %v", l.cert, err)
		return nil
	}
	return chain
}

func (l *loader) readKey() crypto.Signer {
	content, ok := l.read(FieldKey, l.key, l.createHint())
	if !ok {
		return nil
	}
	if info, err := os.Stat(l.key); err != nil {
		l.add(FieldKey, "", "read %s: %v", l.key, err)
	} else if mode := info.Mode().Perm(); mode&othersMode != 0 {
		l.add(FieldKey, "`chmod o-rwx "+l.key+"`; a group may read it", "%s is open to every user of this host (mode %04o)", l.key, mode)
	}
	signer, err := parseKey(content)
	if err != nil {
		l.add(FieldKey, l.createHint(), "read %s: %v", l.key, err)
		return nil
	}
	return signer
}

func (l *loader) read(field, path, hint string) ([]byte, bool) {
	content, err := readFile(path)
	switch {
	case path == "":
		l.add(field, hint, "no file is given")
	case errors.Is(err, fs.ErrNotExist):
		l.add(field, hint, "%s does not exist", path)
	case err != nil:
		l.add(field, "", "%v", err) // has the path
	default:
		return content, true
	}
	return nil, false
}

// createHint is the command that makes the certificate wanted.
func (l *loader) createHint() string {
	role, dc, node := RoleServer, "DC", "NODE"
	if l.want.Role != "" {
		role, dc, node = l.want.Role, l.want.Datacenter, l.want.Node
	}
	return fmt.Sprintf("`culvert tls cert create --%s --dc %s --node %s --domain %s` makes a certificate and its key", role, dc, node, l.domain)
}

func (l *loader) checkDates(leaf *x509.Certificate) {
	switch {
	case l.now.Before(leaf.NotBefore):
		l.add(FieldCert, "check the clock of this host", "%s is not valid before %s; it is %s", l.cert, timestamp(leaf.NotBefore), timestamp(l.now))
	case l.now.After(leaf.NotAfter):
		l.add(FieldCert, l.createHint(), "%s expired %s; it is %s", l.cert, timestamp(leaf.NotAfter), timestamp(l.now))
	}
}

func (l *loader) checkUsages(leaf *x509.Certificate) {
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 || slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if !slices.Contains(leaf.ExtKeyUsage, usage) {
			l.add(FieldCert, l.createHint(), "%s cannot be used for %s: wanted extended key usage serverAuth, clientAuth; found %s",
				l.cert, usageName(usage), usages(leaf))
		}
	}
}

func (l *loader) checkNames(leaf *x509.Certificate) Identity {
	id, err := IdentityOf(leaf, l.domain)
	refusal, refused := errors.AsType[*PeerError](err)
	if l.want.Role == "" {
		if refused {
			l.add(FieldCert, l.createHint(), "%s has the wrong names: wanted %s; found %s", l.cert, refusal.Wanted, refusal.Found)
		}
		return id
	}
	wanted := l.want.names(l.domain)
	lacks := func(name string) bool { return !slices.ContainsFunc(leaf.DNSNames, equalFold(name)) }
	if refused || id != lower(l.want) || slices.ContainsFunc(wanted, lacks) {
		l.add(FieldCert, l.createHint(), "%s has the wrong names: wanted %s; found %s",
			l.cert, strings.Join(wanted, ", "), strings.TrimPrefix(describe(leaf), "names "))
	}
	return id
}

func equalFold(a string) func(string) bool {
	return func(b string) bool { return strings.EqualFold(a, b) }
}

func lower(id Identity) Identity {
	id.Datacenter, id.Node = lowerASCII(id.Datacenter), lowerASCII(id.Node)
	return id
}

// checkChain tells whether the certificate leads to the CA, and until when.
func (l *loader) checkChain(g *generation) time.Time {
	var last time.Time
	if len(g.trust.cas) == 0 {
		return last // told already
	}
	paths, err := g.trust.verify(g.chain, x509.ExtKeyUsageAny, l.now)
	refusal, refused := errors.AsType[*PeerError](err)
	switch {
	case !refused:
	case (refusal.Reason == ReasonExpired || refusal.Reason == ReasonNotYetValid) && !inTime(g.chain[0], l.now):
		// Told already; the CA's dates are told once the certificate's own are right.
	case refusal.Reason == ReasonExpired || refusal.Reason == ReasonNotYetValid:
		l.add(FieldCA, newCAHint, "%s: wanted %s; found %s", l.ca, refusal.Wanted, refusal.Found)
	default:
		l.add(FieldCert, "", "%s does not lead to %s: wanted %s; found %s", l.cert, l.ca, refusal.Wanted, refusal.Found)
	}
	for _, path := range paths {
		first := path[0].NotAfter
		for _, c := range path {
			if c.NotAfter.Before(first) {
				first = c.NotAfter
			}
		}
		if first.After(last) {
			last = first
		}
	}
	return last
}

func inTime(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotBefore) && !now.After(c.NotAfter)
}
