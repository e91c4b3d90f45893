package main

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// culvert runs one command line.
func culvert(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	code = run(ctx, args, &out, &errs)
	return code, out.String(), errs.String()
}

// A file with ten faults of many kinds prints ten messages; `culvert sidecar`
// prints the same bytes.
func TestTenFaults(t *testing.T) {
	const file = "testdata/ten-faults.hcl"
	want, err := os.ReadFile("testdata/ten-faults.golden")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(want, []byte("\n")); n != 10 {
		t.Errorf("the golden file has %d lines", n)
	}
	for _, args := range [][]string{{"validate", file}, {"sidecar", "--config", file}} {
		code, stdout, stderr := culvert(t, args...)
		if code != exitUsage || stdout != "" || stderr != string(want) {
			t.Errorf("culvert %v ends with %d and prints\n%s%s\nwant 2 and\n%s", args, code, stdout, stderr, want)
		}
	}
}

// files writes the files of a sidecar whose certificate is for node.
func files(t *testing.T, node string, change func(key string)) string {
	t.Helper()
	dir := t.TempDir()
	ca := testpki.New(t, "consul")
	caFile, cert, key := ca.WriteFiles(t, dir, ca.Leaf(t, testpki.Server("dc1", node)))
	if change != nil {
		change(key)
	}
	text := `datacenter = "dc1"
node       = "alice"
server {
  profile   = "serf"
  address   = "127.0.0.1"
  advertise = "127.92.1.1"
}
listen { address = "127.0.0.1:0" }
admin { address = "127.0.0.1:0" }
tls {
  ca_file   = "` + filepath.Base(caFile) + `"
  cert_file = "` + filepath.Base(cert) + `"
  key_file  = "` + filepath.Base(key) + `"
}
`
	file := filepath.Join(dir, "sidecar.hcl")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestValidate(t *testing.T) {
	file := files(t, "alice", nil)
	code, stdout, stderr := culvert(t, "validate", file)
	if want := file + ": ok: sidecar dc1/alice, 2 services, 0 peers, 0 gateways\n"; code != exitOK || stdout != want || stderr != "" {
		t.Errorf("ends with %d and prints %q %q, want %q", code, stdout, stderr, want)
	}
}

// A certificate that is not this node's, and a key that anybody can read, are
// told with what was wanted and found, by validate and at the start alike.
func TestCertificateFaults(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string
	}{
		"wrong names": {files(t, "amy", nil), []string{
			":12:15: ", "wanted alice.server.dc1.consul, server.dc1.consul; found amy.server.dc1.consul, server.dc1.consul, localhost",
		}},
		"readable key": {files(t, "alice", func(key string) {
			if err := os.Chmod(key, 0o644); err != nil {
				t.Fatal(err)
			}
		}), []string{":13:15: ", "chmod"}},
	} {
		var printed [2]string
		for i, args := range [][]string{{"validate", c.file}, {"sidecar", "--config", c.file}} {
			code, _, stderr := culvert(t, args...)
			if code != exitUsage {
				t.Errorf("%s: culvert %s ends with %d, want 2", name, args[0], code)
			}
			printed[i] = stderr
		}
		if printed[0] != printed[1] {
			t.Errorf("%s: validate prints\n%s\nsidecar\n%s", name, printed[0], printed[1])
		}
		for _, want := range c.want {
			if !strings.Contains(printed[0], want) {
				t.Errorf("%s: %q lacks %q", name, printed[0], want)
			}
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"unknown command": {[]string{"sidcar"}, "culvert: error: unknown command \"sidcar\" for \"culvert\"\nculvert: hint: did you mean `culvert sidecar`?\n"},
		"unknown flag":    {[]string{"status", "--jsn"}, "culvert: hint: see `culvert status --help`\n"},
		"missing flag":    {[]string{"sidecar"}, "culvert: error: --config is missing\nculvert: hint: culvert sidecar --config FILE\n"},
		"an argument":     {[]string{"status", "x"}, "culvert: hint: see `culvert status --help`\n"},
		"no files":        {[]string{"validate"}, "culvert: hint: see `culvert validate --help`\n"},
	} {
		code, _, stderr := culvert(t, c.args...)
		if code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: ends with %d and prints %q, want 2 and %q", name, code, stderr, c.want)
		}
	}
	if code, _, stderr := culvert(t, "sidecar", "--config", "/nowhere.hcl"); code != exitUsage || !strings.Contains(stderr, "/nowhere.hcl: read the file") {
		t.Errorf("a missing file: %d, %q", code, stderr)
	}
}

func TestStatusOfNobody(t *testing.T) {
	code, _, stderr := culvert(t, "status", "--admin", "127.0.0.1:1")
	if code != exitRuntime || !strings.Contains(stderr, "culvert: error: ask 127.0.0.1:1: ") || !strings.Contains(stderr, "culvert: hint: is the process running") {
		t.Errorf("ends with %d and prints %q", code, stderr)
	}
}

// A whole life: the sidecar starts, answers, shows its status, and stops when
// its context ends.
func TestSidecarRunsAndStops(t *testing.T) {
	file := files(t, "alice", nil)
	admin := freeAdmin(t)
	ctx, cancel := context.WithCancel(t.Context())
	var out, errs bytes.Buffer
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{"sidecar", "--config", file, "--admin", admin, "--log-level", "error"}, &out, &errs)
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var stdout string
	for range 250 {
		var code int
		if code, stdout, _ = culvert(t, "status", "--admin", admin); code == exitOK && strings.Contains(stdout, ", ready") {
			break
		}
		<-tick.C
	}
	if !strings.HasPrefix(stdout, "sidecar dc1/alice, version "+version+", ready\n\nPEER ") {
		t.Errorf("status prints %q", stdout)
	}
	if _, json, _ := culvert(t, "status", "--admin", admin, "--json"); !strings.Contains(json, `"kind": "sidecar"`) {
		t.Errorf("status --json prints %q", json)
	}

	// SIGHUP: a peer more, and then a file with a fault, which changes nothing.
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	peer := "peer \"bob\" {\n  datacenter = \"dc2\"\n  advertise = \"127.92.2.1\"\n  address = \"127.0.0.1:1\"\n}\n"
	for _, change := range []string{peer, peer + "nonsense = 1\n"} {
		if err := os.WriteFile(file, append(bytes.Clone(text), change...), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for range 250 {
			if _, stdout, _ = culvert(t, "status", "--admin", admin); strings.Contains(stdout, "dc2/bob") {
				break
			}
			<-tick.C
		}
		if !strings.Contains(stdout, "dc2/bob") {
			t.Errorf("after SIGHUP status prints %q", stdout)
		}
	}
	cancel()
	select {
	case code := <-done:
		if code != exitOK {
			t.Errorf("ends with %d: %s", code, errs.String())
		}
	case <-time.After(10 * time.Second):
		t.Fatal("did not stop within 10 s")
	}
}

// freeAdmin is an admin address on which nobody listens: a loopback address of
// this process's own.
func freeAdmin(t *testing.T) string {
	t.Helper()
	pid := os.Getpid()
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 93, byte(pid >> 8), byte(pid)}), 7440).String()
}
