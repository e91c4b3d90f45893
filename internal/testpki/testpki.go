// Package testpki makes certificate authorities and certificates for tests, in
// memory, so that no private key is ever committed.
//
//	ca := testpki.New(t, "consul")
//	alice := ca.Leaf(t, testpki.Server("dc1", "alice"))
//	mallory := testpki.New(t, "consul").Leaf(t, testpki.Server("dc1", "alice"))
//	old := ca.Leaf(t, testpki.Server("dc1", "bob"), testpki.NotAfter(time.Now().Add(-time.Hour)))
//	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), alice)
//
// Validity is relative to time.Now, so a CA that is made inside a synctest
// bubble fits the bubble's clock and no other. A [CA] and a [Cert] are immutable
// and may be used by any number of goroutines. The package knows nothing of
// package certs, whose tests it serves.
package testpki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// The validity that a certificate has when no option says otherwise: long
// enough for a test that sleeps for days on a fake clock.
const (
	backdate = time.Hour
	lifetime = 30 * 24 * time.Hour
)

// A CA issues certificates.
type CA struct {
	Domain string
	Cert   *x509.Certificate
	PEM    []byte // the CA's certificate
	KeyPEM []byte // the CA's private key, PKCS #8

	key crypto.Signer
}

// A Cert is a certificate with its key.
type Cert struct {
	TLS     tls.Certificate // with Leaf set; the chain is the leaf alone
	Leaf    *x509.Certificate
	CertPEM []byte
	KeyPEM  []byte // PKCS #8
}

// An Option changes what [CA.Leaf] or [New] issues. Options are applied in order.
type Option func(domain string, template *x509.Certificate)

// Server is a server of a datacenter: the names that `consul tls cert create
// -server -node` gives, localhost among them. With an empty node there is no name of its own.
func Server(dc, node string) Option { return role("server", dc, node) }

// Gateway is a gateway of a datacenter, as a client of the federation API.
func Gateway(dc, node string) Option { return role("gateway", dc, node) }

// Client is what `consul tls cert create -client` makes.
func Client(dc string) Option { return role("client", dc, "") }

func role(name, dc, node string) Option {
	return func(domain string, template *x509.Certificate) {
		base := name + "." + dc + "." + domain
		names := []string{base, "localhost"}
		if node != "" {
			names = []string{node + "." + base, base, "localhost"}
		}
		template.DNSNames = append(template.DNSNames, names...)
	}
}

// Names adds DNS names, as they are.
func Names(names ...string) Option {
	return func(_ string, template *x509.Certificate) {
		template.DNSNames = append(template.DNSNames, names...)
	}
}

// NoNames takes away every name and address.
func NoNames() Option {
	return func(_ string, template *x509.Certificate) {
		template.DNSNames, template.IPAddresses = nil, nil
	}
}

// NotBefore sets the start of validity.
func NotBefore(t time.Time) Option {
	return func(_ string, template *x509.Certificate) { template.NotBefore = t }
}

// NotAfter sets the end of validity. A start that is not earlier is moved to an
// hour before it.
func NotAfter(t time.Time) Option {
	return func(_ string, template *x509.Certificate) {
		template.NotAfter = t
		if !template.NotBefore.Before(t) {
			template.NotBefore = t.Add(-time.Hour)
		}
	}
}

// Usages replaces the extended key usages, by default server and client
// authentication. With none the extension is absent, which allows every use.
func Usages(usages ...x509.ExtKeyUsage) Option {
	return func(_ string, template *x509.Certificate) { template.ExtKeyUsage = usages }
}

// CommonName replaces the subject's common name.
func CommonName(name string) Option {
	return func(_ string, template *x509.Certificate) { template.Subject.CommonName = name }
}

// New makes a CA. Two CAs of one domain have the same subject and different keys,
// as a CA and its replacement do.
func New(t testing.TB, domain string, options ...Option) *CA {
	t.Helper()
	key := newKey(t)
	template := newTemplate("Test CA " + domain)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	for _, option := range options {
		option(domain, template)
	}
	cert, certPEM := sign(t, template, template, key.Public(), key)
	return &CA{Domain: domain, Cert: cert, PEM: certPEM, KeyPEM: encodeKey(t, key), key: key}
}

// Pool is a pool of this CA alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	return pool
}

// Leaf issues a certificate: for server and client authentication, valid from an
// hour ago for 30 days, without a name, unless options say otherwise.
func (ca *CA) Leaf(t testing.TB, options ...Option) *Cert {
	t.Helper()
	key := newKey(t)
	template := newTemplate("")
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, option := range options {
		option(ca.Domain, template)
	}
	if slices.Contains(template.DNSNames, "localhost") {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	leaf, certPEM := sign(t, template, ca.Cert, key.Public(), ca.key)
	return &Cert{
		TLS:     tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf},
		Leaf:    leaf,
		CertPEM: certPEM,
		KeyPEM:  encodeKey(t, key),
	}
}

// WriteFiles writes the CA's certificate, and the certificate and key of cert,
// into dir as ca.pem, cert.pem and key.pem, the key readable by its owner alone.
// What is there already is replaced, so a second call is a rotation.
func (ca *CA) WriteFiles(t testing.TB, dir string, cert *Cert) (caFile, certFile, keyFile string) {
	t.Helper()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("ca.pem", ca.PEM), write("cert.pem", cert.CertPEM), write("key.pem", cert.KeyPEM)
}

func newTemplate(commonName string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: commonName},
		NotBefore: now.Add(-backdate),
		NotAfter:  now.Add(lifetime),
	}
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, []byte) {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}
