package test

import (
	"context"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/test/lab"
)

// The demo needs no privileges, so these tests run for everybody.

func runDemo(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, lab.Demo(t), append([]string{"--culvert", lab.Culvert(t), "--serf", lab.Serf(t)}, args...)...)
	// An interrupt lets it stop what it has started.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 15 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestDemo(t *testing.T) {
	t.Parallel()
	out, err := runDemo(t)
	if err != nil || !strings.Contains(out, "demo: every step was verified") {
		t.Errorf("the demo ends with %v:\n%s", err, out)
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
