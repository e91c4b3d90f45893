package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/certs"
)

// runTLS runs `culvert tls ARGS` in the current folder.
func runTLS(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := tlsCommand()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.Execute()
	return out.String(), err
}

func mustTLS(t *testing.T, args ...string) string {
	t.Helper()
	out, err := runTLS(t, args...)
	if err != nil {
		t.Fatalf("tls %q: %v", args, err)
	}
	return out
}

func TestTLSCreateAndInspect(t *testing.T) {
	t.Chdir(t.TempDir())
	day := func(days int) string { return time.Now().UTC().AddDate(0, 0, days).Format(time.DateOnly) }

	if got, want := mustTLS(t, "ca", "create"), "consul-ca.pem  valid until "+day(5*365)+"\nconsul-ca-key.pem  keep it secret\n"; got != want {
		t.Errorf("ca create printed %q; want %q", got, want)
	}
	mustTLS(t, "ca", "create", "--domain", "nomad", "--days", "30")
	got := mustTLS(t, "cert", "create", "--server", "--dc", "dc1", "--node", "alice")
	if want := "dc1-server-consul-alice.pem  valid until " + day(365) + "\ndc1-server-consul-alice-key.pem  keep it secret\n"; got != want {
		t.Errorf("cert create printed %q; want %q", got, want)
	}
	// As long as the CA at most.
	got = mustTLS(t, "cert", "create", "--gateway", "--dc", "dc2", "--node", "gw1", "--domain", "nomad")
	if want := "dc2-gateway-nomad-gw1.pem  valid until " + day(30) + "\n"; !strings.HasPrefix(got, want) {
		t.Errorf("cert create printed %q; want %q", got, want)
	}
	// With a CA that lies elsewhere, under another name.
	mustTLS(t, "cert", "create", "--server", "--dc", "dc1", "--node", "amy", "--days", "7", "--ca", "nomad-ca.pem", "--key", "nomad-ca-key.pem")

	got = mustTLS(t, "inspect", "dc1-server-consul-alice.pem")
	for _, want := range []string{
		"subject    \"CN=alice.server.dc1.consul\"\n",
		"names      alice.server.dc1.consul, server.dc1.consul\n",
		"role       server\n",
		"identity   dc1/alice in domain consul\n",
		"used for   clientAuth, serverAuth\n",
		", 364 days left\n",
		"issued by  \"CN=Culvert CA consul\" (key id ",
		"chain      \"CN=alice.server.dc1.consul\" <- \"CN=Culvert CA consul\"\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("inspect printed\n%swithout %q", got, want)
		}
	}
	if got = mustTLS(t, "inspect", "consul-ca.pem"); !strings.Contains(got, "role       CA\nused for   issuing certificates\n") {
		t.Errorf("inspect of a CA printed\n%s", got)
	}
	if got = mustTLS(t, "inspect", "--domain", "consul", "dc2-gateway-nomad-gw1.pem"); !strings.Contains(got, "identity   none, other_domain: wanted ") {
		t.Errorf("inspect in another domain printed\n%s", got)
	}
	if got = mustTLS(t, "inspect", "--ca", "nomad-ca.pem", "dc1-server-consul-alice.pem"); !strings.Contains(got, "chain      certificate refused (other_ca): wanted ") {
		t.Errorf("inspect with another CA printed\n%s", got)
	}
	var facts []certs.Facts
	if err := json.Unmarshal([]byte(mustTLS(t, "inspect", "--json", "dc2-gateway-nomad-gw1.pem")), &facts); err != nil {
		t.Fatal(err)
	}
	if len(facts) != 1 || facts[0].Role != certs.RoleGateway || facts[0].Node != "gw1" || facts[0].Domain != "nomad" || len(facts[0].Chain) != 2 {
		t.Errorf("inspect --json printed %+v", facts)
	}
}

func TestTLSErrors(t *testing.T) {
	t.Chdir(t.TempDir())
	mustTLS(t, "ca", "create", "--domain", "taken")
	before, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		args  string
		err   string
		usage bool
		hint  bool
	}{
		{"cert create --dc dc1 --node alice", "want one of --server and --gateway", true, true},
		{"cert create --server --gateway --dc dc1 --node alice", "want one of --server and --gateway", true, true},
		{"cert create --server --dc dc1", "want both --dc and --node", true, true},
		{"cert create --server --node alice", "want both --dc and --node", true, true},
		{"cert create --server --dc dc1 --node alice --ca x", "want both --ca and --key, or neither", true, true},
		{"cert create --server --dc dc.1 --node alice", "check datacenter: ", true, false},
		{"cert create --server --dc dc1 --node alice --days -3", "check days: ", true, false},
		{"ca create --domain a_b", "check domain: ", true, false},
		{"cert create --server --dc dc1 --node alice", "consul-ca.pem does not exist", false, true},
		{"ca create --domain taken", "taken-ca.pem exists, and is not overwritten", false, true},
		{"inspect taken-ca-key.pem", "there is no PEM certificate in it", false, true},
		{"inspect nowhere.pem", "nowhere.pem: no such file", false, false},
	}
	for _, c := range cases {
		_, err := runTLS(t, strings.Fields(c.args)...)
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v; want %q", c.args, err, c.err)
			continue
		}
		coder, usage := errors.AsType[interface {
			error
			ExitCode() int
		}](err)
		if usage != c.usage || usage && coder.ExitCode() != 2 {
			t.Errorf("%s: of the command line: %t; want %t", c.args, usage, c.usage)
		}
		_, hint := errors.AsType[interface {
			error
			Hint() string
		}](err)
		if hint != c.hint {
			t.Errorf("%s: hint %t; want %t", c.args, hint, c.hint)
		}
	}
	after, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.EqualFunc(before, after, func(a, b os.DirEntry) bool { return a.Name() == b.Name() }) {
		t.Errorf("files %v, then %v", before, after)
	}
}

// Every command tells how it is used.
func TestTLSHelp(t *testing.T) {
	for _, args := range [][]string{{}, {"ca", "create"}, {"cert", "create"}, {"inspect"}} {
		if out := mustTLS(t, append(args, "--help")...); !strings.Contains(out, "Examples:\n  culvert tls ") {
			t.Errorf("%q --help printed\n%s", args, out)
		}
	}
}
