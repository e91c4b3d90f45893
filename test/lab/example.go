package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Examples are the files of deploy/ on the hosts that they are for: alice's in
// dc1, 10.71.0.11, with its gateway, and bob's in dc2, who has their mirror image.
type Examples struct {
	t   testing.TB
	net *Network
	pki string // where `culvert tls` has made the certificates
}

// NewExamples makes a network of one host and one gateway in each of two
// datacenters, and certificates for both of the domains given, by the commands that
// the handbook names.
func NewExamples(t testing.TB, domains ...string) *Examples {
	t.Helper()
	e := &Examples{t: t, net: TwoSites(t, Options{HostsA: 1, HostsB: 1}), pki: t.TempDir()}
	e.net.DefaultRoutes()
	for _, domain := range domains {
		e.culvert("ca", "create", "--domain", domain)
		e.culvert("cert", "create", "--server", "--dc", "dc1", "--node", "alice", "--domain", domain)
		e.culvert("cert", "create", "--server", "--dc", "dc2", "--node", "bob", "--domain", domain)
	}
	return e
}

func (e *Examples) culvert(args ...string) {
	e.t.Helper()
	cmd := exec.Command(Culvert(e.t), append([]string{"tls"}, args...)...)
	cmd.Dir = e.pki
	if out, err := cmd.CombinedOutput(); err != nil {
		e.t.Fatalf("culvert tls %v: %v\n%s", args, err, out)
	}
}

// Hosts are alice's and bob's.
func (e *Examples) Hosts() (alice, bob *Host) {
	return e.net.Sites[0].Hosts[0], e.net.Sites[1].Hosts[0]
}

// Gateways are the hosts of the two gateways.
func (e *Examples) Gateways() (dc1, dc2 *Host) { return e.net.Sites[0].Gateway, e.net.Sites[1].Gateway }

// SentPlainly is how many packets went past the sidecars to the other datacenter.
func (e *Examples) SentPlainly() int { return e.net.SentPlainly() }

// mirror makes dc2's of what is dc1's.
//
//nolint:gochecknoglobals // a table
var mirror = strings.NewReplacer(
	"dc1", "dc2", "dc2", "dc1", "alice", "bob", "bob", "alice", "10.71.0.", "10.72.0.", "10.72.0.", "10.71.0.",
	"10.79.0.1", "10.79.0.2", "10.79.0.2", "10.79.0.1", "127.77.1.1", "127.77.2.1", "127.77.2.1", "127.77.1.1",
)

// File is an example as it is for a host, with the places of its files on that.
func (e *Examples) File(h *Host, name string) string {
	e.t.Helper()
	out := Deployed(e.t, name)
	if strings.HasPrefix(h.Name, "dc2") {
		out = mirror.Replace(out)
	}
	return strings.NewReplacer("/etc/culvert/", e.pki+"/", "/etc/", h.Dir+"/", "/var/lib/", h.Dir+"/", "/run/", h.Dir+"/").Replace(out)
}

// Deployed is a file of deploy/.
func Deployed(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(), "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Culvert starts a sidecar or a gateway with an example.
func (e *Examples) Culvert(h *Host, kind, name string) *Daemon {
	e.t.Helper()
	return h.StartCulvert(kind, e.File(h, name))
}
