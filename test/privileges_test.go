package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"culvert/test/lab"
)

// It takes CAP_NET_ADMIN, that is enough, and who has not got it is told.
func TestRedirectPrivileges(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := settings{hosts: [2]int{1, 1}, redirect: true, noAgents: true}
	f := newFederation(t, s)
	alice := f.servers[0]
	alice.sidecar.Stop()
	const nobody = 65534
	dir := unprivileged(t, nobody)
	config := f.sidecarConfig(alice, s)
	for _, file := range []string{"ca_file", "cert_file", "key_file"} {
		config = copyFile(t, config, file, dir, nobody)
	}
	config = strings.Replace(config, "capture =", "on_exit = \"open\"\ncapture =", 1)
	file := filepath.Join(dir, "sidecar.hcl")
	program := filepath.Join(dir, "culvert")
	binary, err := os.ReadFile(lab.Culvert(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{file: []byte(config), program: binary} {
		if err := os.WriteFile(name, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	as := []string{fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody), "--clear-groups"}
	run := []string{program, "sidecar", "--config", file}
	if out, err := alice.host.Run("setpriv", slices.Concat(as, run)...); err == nil || !strings.Contains(out, "lacks CAP_NET_ADMIN") || !strings.Contains(out, "AmbientCapabilities") {
		t.Errorf("without the capability: %v\n%s", err, out)
	}
	with := slices.Concat(as, []string{"--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin"}, run)
	d := alice.host.StartDaemon("culvert-nobody", "127.0.0.1:7440", "setpriv", with...)
	d.AwaitReady()
	f.wantCarried(alice, f.servers[1])
	d.Stop()
	f.wantPlain("after the stop of a sidecar with CAP_NET_ADMIN alone", alice, f.servers[1].advertise)
}

// unprivileged is a folder that a user without privileges can read.
func unprivileged(t *testing.T, uid int) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	return dir
}

// copyFile copies the file that an attribute names for another user, and returns
// the configuration with the copy.
func copyFile(t *testing.T, config, attribute, dir string, uid int) string {
	t.Helper()
	_, rest, _ := strings.Cut(config, attribute+" = \"")
	from, _, _ := strings.Cut(rest, "\"")
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, filepath.Base(from))
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(to, uid, uid); err != nil {
		t.Fatal(err)
	}
	return strings.Replace(config, from, to, 1)
}
