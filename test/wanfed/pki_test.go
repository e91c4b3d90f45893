package wanfed

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/hashicorp/consul/tlsutil"
)

const domain = "consul"

// A pki is one CA in a folder, made by Culvert's commands or by Consul's library.
type pki struct {
	t       testing.TB
	dir     string
	ca, key string // files
}

// culvertPKI makes a CA with `culvert tls ca create`.
func culvertPKI(t testing.TB) pki {
	t.Helper()
	dir := t.TempDir()
	if out, err := run(t, dir, "tls", "ca", "create", "--domain", domain); err != nil {
		t.Fatalf("create a CA: %v: %s", err, out)
	}
	ca, key := certFiles(dir, domain+"-ca")
	return pki{t, dir, ca, key}
}

// consulPKI makes a CA as `consul tls ca create` does, by tlsutil.GenerateCA
// (tlsutil/generate.go).
func consulPKI(t testing.TB) pki {
	t.Helper()
	p := pki{t: t, dir: t.TempDir()}
	p.ca, p.key = certFiles(p.dir, domain+"-agent-ca")
	ca, key, err := tlsutil.GenerateCA(tlsutil.CAOpts{Days: 5, Domain: domain, Name: "Consul Agent CA"})
	if err != nil {
		t.Fatal(err)
	}
	p.write(p.ca, ca)
	p.write(p.key, key)
	return p
}

func (p pki) write(file, text string) {
	p.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p pki) read(file string) string {
	p.t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// server makes a server's certificate with `culvert tls cert create`, once.
func (p pki) server(dc, node string) cert {
	p.t.Helper()
	certFile, keyFile := certFiles(p.dir, fmt.Sprintf("%s-server-%s-%s", dc, domain, node))
	if _, err := os.Stat(certFile); err != nil {
		out, err := run(p.t, p.dir, "tls", "cert", "create", "--server", "--dc", dc, "--node", node,
			"--domain", domain, "--ca", p.ca, "--key", p.key)
		if err != nil {
			p.t.Fatalf("create a certificate: %v: %s", err, out)
		}
	}
	return cert{p.ca, certFile, keyFile}
}

// native makes a server's certificate as `consul tls cert create -server -node`
// does (command/tls/cert/create/tls_cert_create.go).
func (p pki) native(dc, node string) cert {
	p.t.Helper()
	name := "server." + dc + "." + domain
	return p.generate(tlsutil.CertOpts{Name: name, DNSNames: []string{node + "." + name, name, "localhost"}})
}

// named makes a certificate that is good for both directions, with names.
func (p pki) named(names ...string) cert {
	p.t.Helper()
	return p.generate(tlsutil.CertOpts{DNSNames: names})
}

// generate makes a certificate with tlsutil.GenerateCert (tlsutil/generate.go);
// of the options the signer is set, and what is empty gets Consul's usual.
func (p pki) generate(o tlsutil.CertOpts) cert {
	p.t.Helper()
	o.CA, o.Signer = p.read(p.ca), p.signer()
	if o.Days == 0 {
		o.Days = 5
	}
	if o.ExtKeyUsage == nil {
		o.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	if o.IPAddresses == nil {
		o.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	text, key, err := tlsutil.GenerateCert(o)
	if err != nil {
		p.t.Fatal(err)
	}
	dir, err := os.MkdirTemp(p.dir, "cert-")
	if err != nil {
		p.t.Fatal(err)
	}
	c := cert{p.ca, filepath.Join(dir, "cert.pem"), filepath.Join(dir, "cert-key.pem")}
	p.write(c.cert, text)
	p.write(c.key, key)
	return c
}

// signer reads the CA's key with tlsutil.ParseSigner (tlsutil/generate.go).
func (p pki) signer() crypto.Signer {
	p.t.Helper()
	s, err := tlsutil.ParseSigner(p.read(p.key))
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// configurator is a server's, by tlsutil.NewConfigurator (tlsutil/config.go), with
// the settings that Consul's handbook wants for federation through gateways.
func configurator(t testing.TB, c cert) *tlsutil.Configurator {
	t.Helper()
	cfg, err := tlsutil.NewConfigurator(tlsutil.Config{
		ServerMode: true,
		InternalRPC: tlsutil.ProtocolConfig{
			VerifyIncoming: true, VerifyOutgoing: true, VerifyServerHostname: true,
			CAFile: c.ca, CertFile: c.cert, KeyFile: c.key,
		},
		Domain: domain + ".", // Consul's default has the dot
	}, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}
