package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/internal/testpki"
)

func create(t *testing.T, dir string, id Identity) *Source {
	t.Helper()
	certFile, keyFile, err := CreateCert(CertOptions{Dir: dir, Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	caFile := filepath.Join(dir, "consul-ca.pem")
	if problems := Check(caFile, certFile, keyFile, id, "consul"); len(problems) > 0 {
		t.Fatalf("%q", problems)
	}
	s, err := Load(Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	caFile, caKeyFile, err := CreateCA(CAOptions{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	server := create(t, dir, Identity{"dc1", "rack1.Alice", RoleServer})
	client := create(t, dir, Identity{"dc2", "gw1", RoleGateway})
	files := map[string]os.FileMode{
		"consul-ca.pem": 0o644, "consul-ca-key.pem": 0o600,
		"dc1-server-consul-rack1.alice.pem": 0o644, "dc1-server-consul-rack1.alice-key.pem": 0o600,
		"dc2-gateway-consul-gw1.pem": 0o644, "dc2-gateway-consul-gw1-key.pem": 0o600,
	}
	if caFile != filepath.Join(dir, "consul-ca.pem") || caKeyFile != filepath.Join(dir, "consul-ca-key.pem") {
		t.Errorf("CA in %s and %s", caFile, caKeyFile)
	}
	checkFiles(t, dir, files)

	in, out := handshake(server.ServerConfig(nil, only(RoleGateway)), client.ClientConfig("rack1.alice.server.dc1.consul", nil))
	if in.err != nil || out.err != nil {
		t.Fatal(in.err, out.err)
	}
	ca := server.current.Load().trust.cas[0]
	if !ca.IsCA || !ca.MaxPathLenZero || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || ca.Subject.String() != "CN=Culvert CA consul" {
		t.Errorf("CA: %+v", ca)
	}
	leaf := server.current.Load().chain[0]
	if want := []string{"rack1.alice.server.dc1.consul", "server.dc1.consul"}; !slices.Equal(leaf.DNSNames, want) || len(leaf.IPAddresses) > 0 {
		t.Errorf("names %q %v", leaf.DNSNames, leaf.IPAddresses)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || usages(leaf) != "clientAuth, serverAuth" {
		t.Errorf("leaf: %+v", leaf)
	}
	for name, c := range map[string]*x509.Certificate{"CA": ca, "leaf": leaf} {
		if key, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
			t.Errorf("%s: key %T", name, c.PublicKey)
		}
		if age := time.Since(c.NotBefore); age < time.Minute || age > 2*time.Minute {
			t.Errorf("%s: valid for %v already", name, age)
		}
	}
	if days := time.Until(ca.NotAfter).Hours() / 24; days < 5*365-1 || days > 5*365+1 {
		t.Errorf("the CA is valid for %.1f days", days)
	}
	if days := time.Until(leaf.NotAfter).Hours() / 24; days < 364 || days > 366 {
		t.Errorf("the leaf is valid for %.1f days", days)
	}
}

// checkFiles also shows that no temporary file is left.
func checkFiles(t *testing.T, dir string, want map[string]os.FileMode) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		mode, ok := want[e.Name()]
		if !ok || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %04o; want %04o (there: %t)", e.Name(), info.Mode().Perm(), mode, ok)
		}
	}
	if len(entries) != len(want) {
		t.Errorf("%d files; want %d", len(entries), len(want))
	}
}

func TestCreateNeverOverwrites(t *testing.T) {
	for _, taken := range []string{"consul-ca.pem", "consul-ca-key.pem"} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, taken), "precious")
		_, _, err := CreateCA(CAOptions{Dir: dir})
		if !errors.Is(err, os.ErrExist) || !strings.Contains(err.Error(), taken+" exists, and is not overwritten") {
			t.Errorf("%s: %v", taken, err)
		}
		checkFiles(t, dir, map[string]os.FileMode{taken: 0o600})
		if content, err := os.ReadFile(filepath.Join(dir, taken)); err != nil || string(content) != "precious" {
			t.Errorf("%s: %q, %v", taken, content, err)
		}
	}
	// Not even what appears after the first look, be it a link to nowhere.
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if err := os.Symlink("nowhere", path); err != nil {
		t.Fatal(err)
	}
	if err := writeNew(path, []byte("new"), 0o600); !errors.Is(err, os.ErrExist) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("written through the link")
	}
}

// What a file system without hard links gets.
func TestWriteWithoutLinks(t *testing.T) {
	dir := t.TempDir()
	path, temporary := filepath.Join(dir, "x"), filepath.Join(dir, "temporary")
	if err := replaceReserved(temporary, path); err == nil {
		t.Error("nothing was renamed, without an error")
	}
	checkFiles(t, dir, nil)
	write(t, temporary, "new")
	if err := replaceReserved(temporary, path); err != nil {
		t.Error(err)
	}
	checkFiles(t, dir, map[string]os.FileMode{"x": 0o600})
	if err := replaceReserved(temporary, path); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
}

func TestCreateLeavesNoHalf(t *testing.T) {
	dir := t.TempDir()
	keyFile, certFile := filepath.Join(dir, "key.pem"), filepath.Join(dir, "nowhere", "cert.pem")
	if err := writePair(certFile, []byte("cert"), keyFile, []byte("key")); err == nil {
		t.Error("written into a folder that is not there")
	}
	checkFiles(t, dir, nil)
}

func TestCreateRefusals(t *testing.T) {
	server := func(dc, node string) CertOptions {
		return CertOptions{Identity: Identity{dc, node, RoleServer}}
	}
	long := strings.Repeat("a", 60)
	cases := []struct {
		o    CertOptions
		want string
		code bool // a wrong command line
	}{
		{server("dc1", ""), "check node: ", true},
		{server("", "alice"), "check datacenter: a label is empty", true},
		{server("dc.1", "alice"), `check datacenter: label "dc.1" has '.'`, true},
		{server("dc1", "../alice"), "check node: ", true},
		{server("dc1", "al_ice"), `check node: name "al_ice": label "al_ice" has '_', which DNS does not allow`, true},
		{server("dc1", strings.Join([]string{long, long, long, long}, ".")), "check the whole name: ", true},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, Domain: "con/sul"}, "check domain: ", true},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleClient}}, "check role: ", true},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, Days: -1}, "check days: ", true},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, Days: maxDays + 1}, "check days: ", true},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, Domain: "nomad"}, "nomad-ca.pem does not exist", false},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, CAKeyFile: "open-key.pem"}, "open to every user", false},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, CAKeyFile: "other-key.pem"}, "is not the key of a certificate in", false},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, CAFile: "leaf.pem", CAKeyFile: "leaf-key.pem"}, "is not a CA's certificate", false},
		{CertOptions{Identity: Identity{"dc1", "alice", RoleServer}, Now: func() time.Time { return time.Now().AddDate(6, 0, 0) }}, "use CA ", false},
	}
	dir := t.TempDir()
	if _, _, err := CreateCA(CAOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	other := testpki.New(t, "consul")
	leaf := other.Leaf(t)
	write(t, filepath.Join(dir, "other-key.pem"), string(other.KeyPEM))
	writeCert(t, leaf, filepath.Join(dir, "leaf.pem"), filepath.Join(dir, "leaf-key.pem"))
	if err := os.WriteFile(filepath.Join(dir, "open-key.pem"), other.KeyPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "open-key.pem"), 0o644); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		c.o.Dir = dir
		for _, file := range []*string{&c.o.CAFile, &c.o.CAKeyFile} {
			if *file != "" {
				*file = filepath.Join(dir, *file)
			}
		}
		_, _, err := CreateCert(c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v; want %q", c.o, err, c.want)
		}
		if _, ok := errors.AsType[inputError](err); ok != c.code {
			t.Errorf("%v: the command line's fault: %t; want %t", err, ok, c.code)
		}
	}
	if _, _, err := CreateCA(CAOptions{Dir: dir, Domain: "a b"}); err == nil {
		t.Error("a CA for domain \"a b\"")
	}
	if _, _, err := CreateCA(CAOptions{Dir: filepath.Join(dir, "nowhere")}); err == nil {
		t.Error("a CA in a folder that is not there")
	}
	if after, err := os.ReadDir(dir); err != nil || len(after) != len(before) {
		t.Errorf("%d files, then %d (%v)", len(before), len(after), err)
	}
}

// A CA of Consul's, in a bundle after a newer one, and about to end.
func TestCreateFromAnotherCA(t *testing.T) {
	dir := t.TempDir()
	end := time.Now().Add(48 * time.Hour).Truncate(time.Second)
	theirs := testpki.New(t, "consul", testpki.NotAfter(end))
	caFile, keyFile := filepath.Join(dir, "bundle.pem"), filepath.Join(dir, "key.pem")
	write(t, caFile, string(testpki.New(t, "consul").PEM)+string(theirs.PEM))
	write(t, keyFile, string(theirs.KeyPEM))
	certFile, _, err := CreateCert(CertOptions{Dir: dir, CAFile: caFile, CAKeyFile: keyFile, Identity: alice(), Days: 90})
	if err != nil {
		t.Fatal(err)
	}
	facts, err := Inspect(certFile, caFile, "", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if len(facts) != 1 || !facts[0].NotAfter.Equal(end) || len(facts[0].Chain) != 2 {
		t.Errorf("got %+v; want an end with its CA's, %v", facts, end)
	}
}

// A name above the limit for common names is in the certificate all the same.
func TestCreateLongName(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := CreateCA(CAOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	s := create(t, dir, Identity{"dc1", strings.Repeat("a", 63), RoleServer})
	if leaf := s.current.Load().chain[0]; leaf.Subject.CommonName != "" || len(leaf.DNSNames) != 2 {
		t.Errorf("subject %q, names %q", leaf.Subject, leaf.DNSNames)
	}
}

func TestInspect(t *testing.T) {
	ca := testpki.New(t, "nomad")
	dir := t.TempDir()
	file := filepath.Join(dir, "cert.pem")
	write(t, file, string(ca.Leaf(t, testpki.Server("dc1", "alice")).CertPEM)+string(ca.PEM))
	one := func(caFile, domain string, now time.Time) Facts {
		t.Helper()
		facts, err := Inspect(file, caFile, domain, now)
		if err != nil || len(facts) != 2 {
			t.Fatal(facts, err)
		}
		if !facts[1].CA || facts[1].Role != "" || facts[1].ChainFault != "" {
			t.Errorf("CA: %+v", facts[1])
		}
		return facts[0]
	}
	f := one("", "", time.Now())
	if f.Domain != "nomad" || f.Datacenter != "dc1" || f.Node != "alice" || f.Role != RoleServer || f.Usages != "clientAuth, serverAuth" {
		t.Errorf("got %+v", f)
	}
	if want := "not known: there is no " + filepath.Join(dir, "nomad-ca.pem"); f.ChainFault != want || f.Chain != nil {
		t.Errorf("chain %q, %q; want %q", f.Chain, f.ChainFault, want)
	}
	if f = one("", "consul", time.Now()); f.Identity != "other_domain: wanted "+nameWanted {
		t.Errorf("in another domain: %+v", f)
	}
	write(t, filepath.Join(dir, "nomad-ca.pem"), string(ca.PEM))
	if f = one("", "", time.Now()); len(f.Chain) != 2 || f.Chain[1] != `"CN=Test CA nomad"` || f.ChainFault != "" {
		t.Errorf("chain %q, %q", f.Chain, f.ChainFault)
	}
	if f = one("", "", time.Now().AddDate(1, 0, 0)); f.Chain != nil || !strings.Contains(f.ChainFault, "(expired)") {
		t.Errorf("chain %q, %q", f.Chain, f.ChainFault)
	}
	if _, err := Inspect(file, filepath.Join(dir, "nowhere"), "", time.Now()); err == nil {
		t.Error("a CA file that is given may be missing")
	}
	key := filepath.Join(dir, "key.pem")
	write(t, key, string(ca.KeyPEM))
	if _, err := Inspect(key, "", "", time.Now()); err == nil || !strings.Contains(err.Error(), "there is no PEM certificate in it") {
		t.Errorf("of a key: %v", err)
	}
	if _, err := Inspect(file, key, "", time.Now()); err == nil {
		t.Error("with a key for a CA: no error")
	}
}
