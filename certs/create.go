package certs

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const (
	caDays        = 5 * 365
	leafDays      = 365
	maxDays       = 100 * 365
	backdate      = time.Minute // for peers whose clocks are behind
	maxCommonName = 64          // characters, RFC 5280 appendix A.1
)

const newCAHint = "make a new CA in another folder, and add its certificate to ca_file everywhere before the first certificate of it is used"

// CAOptions say what [CreateCA] makes.
type CAOptions struct {
	Dir    string           // where to; "" is the current folder
	Domain string           // "" is consul
	Days   int              // how long it is valid; 0 is 5 years
	Now    func() time.Time // the clock; nil is time.Now
}

// CreateCA makes a CA: an ECDSA P-256 key and a certificate that may issue end
// certificates alone. It writes <domain>-ca.pem and <domain>-ca-key.pem (mode
// 0600), both or neither, never over files that exist, and returns their paths.
func CreateCA(o CAOptions) (certFile, keyFile string, err error) {
	domain := defaultDomain(o.Domain)
	if err := checkName(domain); err != nil {
		return "", "", inputError{fmt.Errorf("check domain: %w", err)}
	}
	template, err := newTemplate("Culvert CA "+domain, o.Days, caDays, o.Now)
	if err != nil {
		return "", "", err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	certFile, keyFile = caFiles(o.Dir, domain)
	return certFile, keyFile, issue(template, nil, nil, certFile, keyFile)
}

// CertOptions say what [CreateCert] makes.
type CertOptions struct {
	Dir       string // where to; "" is the current folder
	CAFile    string // the CA's certificate; "" is <domain>-ca.pem in Dir
	CAKeyFile string // the CA's key; "" is <domain>-ca-key.pem in Dir
	Identity  Identity
	Domain    string           // "" is consul
	Days      int              // how long it is valid, at most as long as the CA; 0 is a year
	Now       func() time.Time // the clock; nil is time.Now
}

// CreateCert makes the certificate of a server or a gateway, for server and client
// authentication, with the names <node>.<role>.<dc>.<domain> and
// <role>.<dc>.<domain>. It writes <dc>-<role>-<domain>-<node>.pem and
// ...-key.pem (mode 0600), both or neither, never over files that exist, and
// returns their paths.
//
// Unlike Consul's, it has no localhost and 127.0.0.1: nothing dials those with
// TLS, and every host would take its holder for itself.
func CreateCert(o CertOptions) (certFile, keyFile string, err error) {
	domain, id := defaultDomain(o.Domain), lower(o.Identity)
	if err := checkIdentity(id, domain); err != nil {
		return "", "", inputError{err}
	}
	name := id.Name(domain)
	template, err := newTemplate(name, o.Days, leafDays, o.Now)
	if err != nil {
		return "", "", err
	}
	if len(name) > maxCommonName {
		template.Subject.CommonName = "" // the names that count are below
	}
	template.DNSNames = id.names(domain)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}

	caFile, caKeyFile := caFiles(o.Dir, domain)
	caFile, caKeyFile = cmp.Or(o.CAFile, caFile), cmp.Or(o.CAKeyFile, caKeyFile)
	ca, caKey, err := readCA(caFile, caKeyFile, domain)
	if err != nil {
		return "", "", err
	}
	if now := template.NotBefore.Add(backdate); !inTime(ca, now) {
		return "", "", hinted{
			fmt.Errorf("use CA %s: it is valid from %s to %s, and it is %s", caFile, timestamp(ca.NotBefore), timestamp(ca.NotAfter), timestamp(now)),
			newCAHint,
		}
	}
	// What outlives its CA only seems valid.
	if ca.NotAfter.Before(template.NotAfter) {
		template.NotAfter = ca.NotAfter
	}
	base := filepath.Join(o.Dir, fmt.Sprintf("%s-%s-%s-%s", id.Datacenter, id.Role, domain, id.Node))
	certFile, keyFile = base+".pem", base+"-key.pem"
	return certFile, keyFile, issue(template, ca, caKey, certFile, keyFile)
}

func defaultDomain(domain string) string { return lowerASCII(cmp.Or(domain, "consul")) }

func caFiles(dir, domain string) (certFile, keyFile string) {
	return filepath.Join(dir, domain+"-ca.pem"), filepath.Join(dir, domain+"-ca-key.pem")
}

func checkIdentity(id Identity, domain string) error {
	if id.Role != RoleServer && id.Role != RoleGateway {
		return fmt.Errorf("check role: %q is neither server nor gateway", id.Role)
	}
	if err := checkLabel(id.Datacenter); err != nil {
		return fmt.Errorf("check datacenter: %w", err)
	}
	if err := checkName(id.Node); err != nil {
		return fmt.Errorf("check node: %w", err)
	}
	if err := checkName(domain); err != nil {
		return fmt.Errorf("check domain: %w", err)
	}
	if err := checkName(id.Name(domain)); err != nil {
		return fmt.Errorf("check the whole name: %w", err)
	}
	return nil
}

func newTemplate(commonName string, days, standard int, clock func() time.Time) (*x509.Certificate, error) {
	days = cmp.Or(days, standard)
	if days < 1 || days > maxDays {
		return nil, inputError{fmt.Errorf("check days: %d is not between 1 and %d", days, maxDays)}
	}
	if clock == nil {
		clock = time.Now
	}
	now := clock()
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: commonName},
		NotBefore: now.Add(-backdate),
		NotAfter:  now.AddDate(0, 0, days),
	}, nil
}

// issue makes a key, signs the template with the CA, or with that key if ca is
// nil, and writes both.
func issue(template, ca *x509.Certificate, caKey crypto.Signer, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	if ca == nil {
		ca, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey) // a nil serial number is a random one
	if err != nil {
		return fmt.Errorf("sign certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	return writePair(
		certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	)
}

// readCA reads a CA to sign with. Its file may be a bundle: the certificate is
// the one of the key.
func readCA(certFile, keyFile, domain string) (*x509.Certificate, crypto.Signer, error) {
	missing := fmt.Sprintf("`culvert tls ca create --domain %s` makes a CA in the current folder; --ca and --key name one that lies elsewhere", domain)
	certText, err := readFile(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, hinted{fmt.Errorf("read CA: %s does not exist", certFile), missing}
	} else if err != nil {
		return nil, nil, fmt.Errorf("read CA: %w", err)
	}
	keyText, err := readFile(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, hinted{fmt.Errorf("read CA's key: %s does not exist", keyFile), missing}
	} else if err != nil {
		return nil, nil, fmt.Errorf("read CA's key: %w", err)
	}
	if info, err := os.Stat(keyFile); err == nil && info.Mode().Perm()&othersMode != 0 {
		return nil, nil, hinted{
			fmt.Errorf("read CA's key: %s is open to every user of this host (mode %04o)", keyFile, info.Mode().Perm()),
			"`chmod o-rwx " + keyFile + "`; a group may read it",
		}
	}
	all, err := parseCertificates(certText)
	if err != nil {
		return nil, nil, fmt.Errorf("read CA %s: %w", certFile, err)
	}
	key, err := parseKey(keyText)
	if err != nil {
		return nil, nil, fmt.Errorf("read CA's key %s: %w", keyFile, err)
	}
	for _, ca := range all {
		if !samePublic(ca.PublicKey, key.Public()) {
			continue
		}
		if !ca.IsCA {
			return nil, nil, fmt.Errorf("read CA %s: %s is not a CA's certificate", certFile, quote(ca.Subject.String()))
		}
		return ca, key, nil
	}
	return nil, nil, fmt.Errorf("read CA: %s is not the key of a certificate in %s", keyFile, certFile)
}

// An inputError is an argument that can never be right.
type inputError struct{ error }

// ExitCode is that of a wrong command line.
func (inputError) ExitCode() int   { return 2 }
func (e inputError) Unwrap() error { return e.error }

// hinted is an error with what helps against it.
type hinted struct {
	error
	hint string
}

func (e hinted) Hint() string  { return e.hint }
func (e hinted) Unwrap() error { return e.error }
