package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Facts are what [Inspect] tells of one certificate. All text is printable.
type Facts struct {
	Subject     string    `json:"subject"`
	KeyID       string    `json:"key_id"` // RFC 5280 section 4.2.1.2, in hex with colons; may be empty
	Issuer      string    `json:"issuer"`
	IssuerKeyID string    `json:"issuer_key_id"`
	CA          bool      `json:"ca"`
	Names       []string  `json:"names"`
	Domain      string    `json:"domain"` // that of the identity; empty for a CA, and where the names tell none
	Role        Role      `json:"role"`
	Datacenter  string    `json:"datacenter"`
	Node        string    `json:"node"`
	Identity    string    `json:"identity_fault"` // why the names tell no identity; empty if they do
	Usages      string    `json:"usages"`         // extended key usages, "any" without the extension
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Chain       []string  `json:"chain"`       // subjects, from the certificate to the CA it leads to
	ChainFault  string    `json:"chain_fault"` // why there is no chain
}

// Inspect tells what the certificates of a PEM file are. An end certificate's
// chain is looked for in caFile, or, if that is "", in <domain>-ca.pem beside
// the file; its identity in the domain given, or, if that is "", in the domain
// that its first name of the scheme has.
func Inspect(file, caFile, domain string, now time.Time) ([]Facts, error) {
	text, err := readFile(file)
	if err != nil {
		return nil, err
	}
	all, err := parseCertificates(text)
	if err != nil {
		return nil, hinted{fmt.Errorf("read %s: %w", file, err), "give the .pem file without -key in its name"}
	}
	var facts []Facts
	for i, cert := range all {
		f := factsOf(cert)
		if !cert.IsCA {
			f.identify(cert, domain)
			if err := f.follow(cert, slices.Concat(all[:i], all[i+1:]), file, caFile, now); err != nil {
				return nil, err
			}
		}
		facts = append(facts, f)
	}
	return facts, nil
}

func factsOf(cert *x509.Certificate) Facts {
	f := Facts{
		Subject: quote(cert.Subject.String()), KeyID: hexID(cert.SubjectKeyId),
		Issuer: quote(cert.Issuer.String()), IssuerKeyID: hexID(cert.AuthorityKeyId),
		CA:        cert.IsCA,
		Usages:    usages(cert),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(),
	}
	for _, name := range cert.DNSNames {
		f.Names = append(f.Names, printable(name))
	}
	return f
}

func (f *Facts) identify(cert *x509.Certificate, domain string) {
	if domain == "" {
		domain = domainOf(cert)
	}
	id, err := IdentityOf(cert, domain)
	if refusal, refused := errors.AsType[*PeerError](err); refused {
		f.Identity = refusal.Reason + ": wanted " + refusal.Wanted
		return
	}
	f.Domain, f.Role, f.Datacenter, f.Node = domain, id.Role, id.Datacenter, id.Node
}

// domainOf returns the domain of the first name that has the scheme's shape,
// and the default one if none has.
func domainOf(cert *x509.Certificate) string {
	for _, name := range cert.DNSNames {
		name = strings.TrimPrefix(lowerASCII(name), "*.")
		if !hasShape(name) {
			continue
		}
		labels := strings.Split(name, ".")
		at := slices.IndexFunc(labels, func(l string) bool { return slices.Contains(roles(), Role(l)) })
		return strings.Join(labels[at+2:], ".")
	}
	return defaultDomain("")
}

func (f *Facts) follow(cert *x509.Certificate, others []*x509.Certificate, file, caFile string, now time.Time) error {
	given := caFile != ""
	if !given {
		caFile, _ = caFiles(filepath.Dir(file), defaultDomain(f.Domain))
	}
	text, err := readFile(caFile)
	if errors.Is(err, fs.ErrNotExist) && !given {
		f.ChainFault = "not known: there is no " + caFile
		return nil
	}
	if err != nil {
		return err
	}
	cas, err := parseCertificates(text)
	if err != nil {
		return fmt.Errorf("read %s: %w", caFile, err)
	}
	chain := append([]*x509.Certificate{cert}, others...)
	paths, err := newTrust(cas).verify(chain, x509.ExtKeyUsageAny, now)
	if err != nil {
		f.ChainFault = err.Error()
		return nil
	}
	for _, c := range paths[0] {
		f.Chain = append(f.Chain, quote(c.Subject.String()))
	}
	return nil
}
