package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

// root is the repository's.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

//nolint:gochecknoglobals // each program is built once in a test binary
var (
	buildCulvert = sync.OnceValues(func() (string, error) {
		return build(".", filepath.Join(root(), "bin", "culvert"), "./cmd/culvert")
	})
	buildSerf = sync.OnceValues(func() (string, error) {
		return build("test/servers", filepath.Join(root(), ".cache", "bin", "serf"), "github.com/hashicorp/serf/cmd/serf")
	})
	buildConsul = sync.OnceValues(func() (string, error) {
		return build("test/servers/consul", filepath.Join(root(), ".cache", "bin", "consul"), "github.com/hashicorp/consul")
	})
	buildNomad = sync.OnceValues(func() (string, error) {
		return build("test/servers/nomad", filepath.Join(root(), ".cache", "bin", "nomad"), "github.com/hashicorp/nomad")
	})
	buildAlertmanager = sync.OnceValues(func() (string, error) {
		return build("test/servers/alertmanager", filepath.Join(root(), ".cache", "bin", "alertmanager"), "github.com/prometheus/alertmanager/cmd/alertmanager")
	})
	buildDemo = sync.OnceValues(func() (string, error) {
		return build(".", filepath.Join(root(), ".cache", "bin", "demo"), "./test/demo")
	})
)

func build(dir, out, pkg string) (string, error) {
	cmd := exec.Command("go", "build", "-o", out, pkg)
	cmd.Dir = filepath.Join(root(), dir)
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", pkg, err, b)
	}
	return out, nil
}

func built(t testing.TB, f func() (string, error)) string {
	t.Helper()
	path, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Culvert builds the program under test and returns its path.
func Culvert(t testing.TB) string { t.Helper(); return built(t, buildCulvert) }

// Serf builds the upstream serf agent, unchanged, and returns its path.
func Serf(t testing.TB) string { t.Helper(); return built(t, buildSerf) }

// ConsulProgram builds Consul, unchanged, and returns its path. The first time
// takes minutes.
func ConsulProgram(t testing.TB) string { t.Helper(); return built(t, buildConsul) }

// NomadProgram is ConsulProgram for Nomad.
func NomadProgram(t testing.TB) string { t.Helper(); return built(t, buildNomad) }

// AlertmanagerProgram is ConsulProgram for Alertmanager.
func AlertmanagerProgram(t testing.TB) string { t.Helper(); return built(t, buildAlertmanager) }

// Demo builds the demo and returns its path.
func Demo(t testing.TB) string { t.Helper(); return built(t, buildDemo) }

// WriteFile writes a file into the host's folder and returns its path.
func (h *Host) WriteFile(name, text string) string {
	h.t.Helper()
	path := filepath.Join(h.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path
}
