package certs

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"strings"
	"testing"
	"time"

	"culvert/internal/testpki"
)

func alice() Identity { return Identity{Datacenter: "dc1", Node: "alice", Role: RoleServer} }

func TestCheck(t *testing.T) {
	ca := testpki.New(t, "consul")
	good := ca.Leaf(t, testpki.Server("dc1", "alice"))
	const serverHint = "`culvert tls cert create --server --dc dc1 --node alice --domain consul` makes a certificate and its key"
	past, future := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	cases := []struct {
		name string
		do   func(caFile, certFile, keyFile string)
		want []Problem // Summary: part of it, FILES replaced
	}{
		{"good", func(_, _, _ string) {}, nil},
		{"group may read the key", func(_, _, key string) { _ = os.Chmod(key, 0o640) }, nil},
		{"no extended key usage", func(_, cert, key string) {
			writeCert(t, ca.Leaf(t, testpki.Server("dc1", "alice"), testpki.Usages()), cert, key)
		}, nil},
		{"a bundle with another CA, before ours", func(caFile, _, _ string) {
			write(t, caFile, string(testpki.New(t, "consul").PEM)+string(ca.PEM))
		}, nil},

		{"nothing there", func(ca, cert, key string) { _, _, _ = os.Remove(ca), os.Remove(cert), os.Remove(key) }, []Problem{
			{FieldCA, "CA does not exist", "`culvert tls ca create --domain consul` makes a CA, once for all datacenters; copy its certificate here"},
			{FieldCert, "CERT does not exist", serverHint},
			{FieldKey, "KEY does not exist", serverHint},
		}},
		{"garbage", func(ca, cert, key string) { write(t, ca, ""); write(t, cert, "x"); write(t, key, "y") }, []Problem{
			{FieldCA, "read CA: there is no PEM certificate in it", "`culvert tls ca create"},
			{FieldCert, "read CERT: there is no PEM certificate in it", serverHint},
			{FieldKey, "read KEY: there is no PEM private key in it", serverHint},
		}},
		{"broken PEM blocks", func(ca, cert, key string) {
			broken := func(kind string) string {
				return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: []byte("broken")}))
			}
			write(t, ca, broken("CERTIFICATE"))
			write(t, cert, string(good.CertPEM)+broken("CERTIFICATE"))
			write(t, key, broken("EC PRIVATE KEY"))
		}, []Problem{
			{FieldCA, "read CA: parse certificate 1: x509: ", "`culvert tls ca create"},
			{FieldCert, "read CERT: parse certificate 2: x509: ", serverHint},
			{FieldKey, "read KEY: parse private key: ", serverHint},
		}},
		{"encrypted key", func(_, _, key string) {
			write(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")})))
		}, []Problem{{FieldKey, "read KEY: the private key is encrypted", serverHint}}},
		{"folder and huge file", func(ca, cert, _ string) {
			_ = os.Remove(ca)
			_ = os.Mkdir(ca, 0o700)
			write(t, cert, strings.Repeat(" ", maxFile+1))
		}, []Problem{{FieldCA, "is a directory", ""}, {FieldCert, "longer than 1048576 bytes", ""}}},
		{"key readable by others", func(_, _, key string) { _ = os.Chmod(key, 0o604) }, []Problem{
			{FieldKey, "KEY is open to every user of this host (mode 0604)", "`chmod o-rwx KEY`; a group may read it"},
		}},
		{"key of another certificate", func(_, _, key string) { write(t, key, string(ca.Leaf(t).KeyPEM)) }, []Problem{
			{FieldKey, "KEY is not the key of CERT", "give the key that was made with the certificate"},
		}},
		{"CA file holds the certificate", func(ca, _, _ string) { write(t, ca, string(good.CertPEM)) }, []Problem{
			{FieldCA, `CA holds "", which is not a CA's certificate`, "`culvert tls ca create"},
		}},
		{"other CA", func(caFile, _, _ string) { write(t, caFile, string(testpki.New(t, "consul").PEM)) }, []Problem{
			{FieldCert, `CERT does not lead to CA: wanted issued by "CN=Test CA consul" (key id `, ""},
		}},
		{"names", func(_, cert, key string) { writeCert(t, ca.Leaf(t, testpki.Server("dc1", "amy")), cert, key) }, []Problem{
			{FieldCert, "CERT has the wrong names: wanted alice.server.dc1.consul, server.dc1.consul; found amy.server.dc1.consul, server.dc1.consul, localhost", serverHint},
		}},
		{"no node", func(_, cert, key string) { writeCert(t, ca.Leaf(t, testpki.Server("dc1", "")), cert, key) }, []Problem{
			{FieldCert, "wanted alice.server.dc1.consul, server.dc1.consul; found server.dc1.consul, localhost", serverHint},
		}},
		{"wildcard", func(_, cert, key string) {
			writeCert(t, ca.Leaf(t, testpki.Names("*.server.dc1.consul", "server.dc1.consul")), cert, key)
		}, []Problem{
			{FieldCert, "found *.server.dc1.consul, server.dc1.consul", serverHint},
		}},
		{"node alone", func(_, cert, key string) {
			writeCert(t, ca.Leaf(t, testpki.Names("alice.server.dc1.consul")), cert, key)
		}, []Problem{{FieldCert, "found alice.server.dc1.consul", serverHint}}},
		{"none", func(_, cert, key string) { writeCert(t, ca.Leaf(t), cert, key) }, []Problem{
			{FieldCert, "wanted alice.server.dc1.consul, server.dc1.consul; found no names", serverHint},
		}},
		{"expired, server use alone, gateway's names, key of another: all at once", func(_, cert, key string) {
			writeCert(t, ca.Leaf(t, testpki.Gateway("dc1", "gw1"), testpki.NotAfter(past), testpki.Usages(x509.ExtKeyUsageServerAuth)), cert, key)
			write(t, key, string(good.KeyPEM))
		}, []Problem{
			{FieldCert, "CERT expired " + timestamp(past), serverHint},
			{FieldCert, "CERT cannot be used for clientAuth: wanted extended key usage serverAuth, clientAuth; found serverAuth", serverHint},
			{FieldCert, "found gw1.gateway.dc1.consul", serverHint},
			{FieldKey, "KEY is not the key of CERT", ""},
		}},
		{"client use alone, not yet valid", func(_, cert, key string) {
			writeCert(t, ca.Leaf(t, testpki.Server("dc1", "alice"), testpki.NotBefore(future), testpki.Usages(x509.ExtKeyUsageClientAuth)), cert, key)
		}, []Problem{
			{FieldCert, "CERT is not valid before " + timestamp(future), "check the clock of this host"},
			{FieldCert, "CERT cannot be used for serverAuth", serverHint},
		}},
		{"CA expired", func(caFile, cert, key string) {
			ended := testpki.New(t, "consul", testpki.NotAfter(past))
			write(t, caFile, string(ended.PEM))
			writeCert(t, ended.Leaf(t, testpki.Server("dc1", "alice")), cert, key)
		}, []Problem{
			{FieldCA, `CA "CN=Test CA consul" expired ` + timestamp(past), "make a new CA"},
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), good)
			c.do(caFile, certFile, keyFile)
			got := Check(caFile, certFile, keyFile, alice(), "consul")
			named := strings.NewReplacer(caFile, "CA", certFile, "CERT", keyFile, "KEY")
			if len(got) != len(c.want) {
				t.Fatalf("got %q\nwant %q", got, c.want)
			}
			for i, want := range c.want {
				summary, hint := named.Replace(got[i].Summary), named.Replace(got[i].Hint)
				if got[i].Field != want.Field || !strings.Contains(summary, want.Summary) || !strings.Contains(hint, want.Hint) {
					t.Errorf("problem %d:\ngot  %q %q %q\nwant %q", i, got[i].Field, summary, hint, want)
				}
			}
			_, err := Load(Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
			if len(c.want) == 0 && err != nil {
				t.Errorf("Load: %v", err)
			}
		})
	}
}

func writeCert(t *testing.T, cert *testpki.Cert, certFile, keyFile string) {
	t.Helper()
	write(t, certFile, string(cert.CertPEM))
	write(t, keyFile, string(cert.KeyPEM))
}

// With a gateway's block, the same for its role.
func TestCheckGateway(t *testing.T) {
	ca := testpki.New(t, "consul")
	want := Identity{Datacenter: "DC1", Node: "gw1", Role: RoleGateway}
	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), ca.Leaf(t, testpki.Gateway("dc1", "gw1")))
	if got := Check(caFile, certFile, keyFile, want, "consul"); len(got) > 0 {
		t.Errorf("got %q", got)
	}
	writeCert(t, ca.Leaf(t, testpki.Server("dc1", "gw1")), certFile, keyFile)
	got := Check(caFile, certFile, keyFile, want, "consul")
	if len(got) != 1 || !strings.Contains(got[0].Summary, "wanted gw1.gateway.dc1.consul, gateway.dc1.consul; found gw1.server.dc1.consul") ||
		!strings.Contains(got[0].Hint, "--gateway") {
		t.Errorf("got %q", got)
	}
}

func TestCheckWithoutFiles(t *testing.T) {
	for i, p := range Check("", "", "", alice(), "consul") {
		if field := []string{FieldCA, FieldCert, FieldKey}[i]; p.Field != field || p.Summary != "no file is given" || p.Hint == "" {
			t.Errorf("got %q", p)
		}
	}
}

// Load tells the same in one error, and of names only what nobody could use.
func TestLoadErrors(t *testing.T) {
	ca := testpki.New(t, "consul")
	dir := t.TempDir()
	ca.WriteFiles(t, dir, ca.Leaf(t, testpki.Names("localhost")))
	o := optionsFor(dir)
	if err := os.Chmod(o.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Load(o)
	want := "key_file: " + o.KeyFile + " is open to every user of this host (mode 0644); " +
		"cert_file: " + o.CertFile + " has the wrong names: wanted a name like <node>.server.<dc>.consul; found names localhost"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if hinter, ok := err.(interface{ Hint() string }); !ok || !strings.HasPrefix(hinter.Hint(), "`chmod") {
		t.Errorf("no hint in %#v", err)
	}
}

// An older CA may have any kind of key, and so may a certificate.
func TestKeyKinds(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for kind, der := range map[string][]byte{"RSA PRIVATE KEY": x509.MarshalPKCS1PrivateKey(rsaKey)} {
		key, err := parseKey(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
		if err != nil || !samePublic(key.Public(), rsaKey.Public()) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	template := &x509.Certificate{DNSNames: []string{"alice.server.dc1.consul"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, rsaKey.Public(), rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := optionsFor(dir)
	certPEM := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, o.CAFile, certPEM)
	write(t, o.CertFile, certPEM)
	write(t, o.KeyFile, string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey)})))
	src, err := Load(o)
	if err != nil {
		t.Fatal(err)
	}
	server, client := handshake(src.ServerConfig(nil, only(RoleServer)), src.ClientConfig("alice.server.dc1.consul", nil))
	if server.err != nil || client.err != nil {
		t.Error(server.err, client.err)
	}
}
