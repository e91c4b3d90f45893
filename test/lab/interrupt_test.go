package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// underTest, in the environment, has TestInterrupt be what is interrupted.
const underTest = "CULVERT_LAB_INTERRUPTED"

// A run that is interrupted leaves no namespace, no process and no file behind.
func TestInterrupt(t *testing.T) {
	Require(t)
	if os.Getenv(underTest) != "" {
		h := TwoSites(t, Options{HostsA: 1, HostsB: 1}).Sites[0].Hosts[0]
		p := h.Start("sleep", "/bin/sleep", "60")
		_, _ = fmt.Fprintln(os.Stdout, "ready", p.cmd.Process.Pid, h.Dir)
		Wait(time.Minute)
	}
	t.Run("as a shell starts it", func(t *testing.T) {
		ended := interrupt(t, exec.Command(os.Args[0], "-test.run", "^TestInterrupt$"))
		if ended.Signal() != syscall.SIGINT {
			t.Errorf("it ended with %v, want an interrupt", ended)
		}
	})
	t.Run("as a script starts it in the background", func(t *testing.T) {
		ended := interrupt(t, exec.Command("/bin/sh", "-c", `trap "" INT; exec "$0" -test.run '^TestInterrupt$'`, os.Args[0]))
		if ended.Signal() != syscall.SIGKILL {
			t.Errorf("it ended with %v, want it killed", ended)
		}
	})
}

// interrupt starts this test, interrupts it once it has a network, and looks for what is
// left.
func interrupt(t *testing.T, cmd *exec.Cmd) syscall.WaitStatus {
	t.Helper()
	cmd.Env = append(os.Environ(), underTest+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt goes to all; this one does not
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	var words []string
	lines := bufio.NewScanner(out)
	for len(words) != 3 && lines.Scan() {
		if words = strings.Fields(lines.Text()); len(words) > 0 && words[0] != "ready" {
			words = nil
		}
	}
	if len(words) != 3 {
		_ = cmd.Wait()
		t.Fatal("no network was made")
	}
	child := cmd.Process.Pid
	if n := len(namespaces(child)); n != 4 {
		t.Errorf("%d namespaces are there, want 4", n)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // its status tells
	if left := namespaces(child); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
	if _, err := os.Stat(words[2]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("files: %v", err)
	}
	sleeper, err := strconv.Atoi(words[1])
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, 10*time.Second, func() error { // somebody else waits for it now
		if err := unix.Kill(sleeper, 0); !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("what ran there is there still: %v", err)
		}
		return nil
	})
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		t.Fatal("no status")
	}
	return status
}
