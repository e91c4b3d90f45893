package test

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/test/lab"
)

// The demo needs no privileges, so these tests run for everybody; its federation
// form runs where one may have namespaces, as root or not.

func demoCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, lab.Demo(t), append([]string{"--culvert", lab.Culvert(t), "--serf", lab.Serf(t)}, args...)...)
	// An interrupt lets it stop what it has started.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 15 * time.Second
	return cmd
}

func runDemo(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := demoCommand(t, args...).CombinedOutput()
	return string(out), err
}

func TestDemo(t *testing.T) {
	t.Parallel()
	out, err := runDemo(t)
	if err != nil || !strings.Contains(out, "demo: every step was verified") {
		t.Errorf("the demo ends with %v:\n%s", err, out)
	}
}

func runFederationDemo(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := runDemo(t, append([]string{"--federation"}, args...)...)
	mayBeMissing(t, out)
	return out, err
}

// mayBeMissing skips the test where the demo has said that it may not have what it
// needs.
func mayBeMissing(t *testing.T, out string) {
	t.Helper()
	for _, lack := range []string{"--federation needs network namespaces of its own", "(package iproute2)"} {
		if strings.Contains(out, lack) && os.Getenv("CULVERT_E2E") != "require" {
			t.Skipf("skipped: %s", out)
		}
	}
}

func TestDemoOfAFederation(t *testing.T) {
	t.Parallel()
	out, err := runFederationDemo(t)
	if err != nil || !strings.Contains(out, "demo: every step was verified") {
		t.Errorf("the demo ends with %v:\n%s", err, out)
	}
}

// An address that is another's already makes it fail, and it says whose it is.
func TestDemoOfAFederationWithASpoiltRecord(t *testing.T) {
	t.Parallel()
	const say = "dc2/dave advertises 127.77.2.1, which is the address of dc2/bob"
	out, err := runFederationDemo(t, "--break", "record")
	if err == nil || !strings.Contains(out, `FAILED: step "add: `) || !strings.Contains(out, say) {
		t.Errorf("the demo ends with %v, want a server that was not added and %q:\n%s", err, say, out)
	}
}

// A demo that is interrupted leaves no process and no file behind.
func TestDemoOfAFederationIsInterrupted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := demoCommand(t, "--federation")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		_ = w.Close()
	}()
	var out strings.Builder
	for lines := bufio.NewScanner(r); lines.Scan(); {
		out.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), "ok      find: ") {
			_ = cmd.Process.Signal(syscall.SIGINT)
		}
	}
	err := <-ended
	mayBeMissing(t, out.String())
	if err == nil || !strings.Contains(out.String(), "FAILED") {
		t.Errorf("the demo ends with %v, want a failure:\n%s", err, out.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v is left behind, %v", left, err)
	}
	environments, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range environments {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), "TMPDIR="+dir) {
			t.Errorf("%s is of a process that is left behind", file)
		}
	}
}

// A part that is spoilt makes the demo fail, and it says in which step.
func TestDemoWithASpoiltPart(t *testing.T) {
	t.Parallel()
	for part, say := range map[string]string{
		"gateway": "the gateway of dc2 is not running",
		"sidecar": "the sidecar of dc2 is not running",
		"cert":    "certificate refused (other_ca)",
	} {
		t.Run(part, func(t *testing.T) {
			out, err := runDemo(t, "--break", part)
			if err == nil || !strings.Contains(out, `FAILED: step "join: `) || !strings.Contains(out, say) {
				t.Errorf("the demo ends with %v, want a failed join and %q:\n%s", err, say, out)
			}
		})
	}
}
