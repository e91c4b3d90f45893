package lab

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// removing is held while an interrupted process removes what it has made, to its end.
//
//nolint:gochecknoglobals // of the process
var removing sync.Mutex

// removeOnInterrupt has an interrupt (Ctrl-C) leave nothing behind: no test's cleanup
// runs then.
func removeOnInterrupt(t testing.TB, dir string) {
	t.Helper()
	signals, over := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-over:
		case s := <-signals:
			sig, _ := s.(syscall.Signal) // there are no others
			removing.Lock()              // and never unlocked: there may be other networks
			_, _ = fmt.Fprintln(os.Stderr, "interrupted: namespaces and what runs in them are removed")
			for _, ns := range namespaces(os.Getpid()) {
				_ = killAll(ns)
				_ = exec.Command("ip", "netns", "del", ns).Run()
			}
			_ = os.RemoveAll(filepath.Dir(dir)) // the test's own
			signal.Reset()
			_ = unix.Kill(os.Getpid(), sig) // as it would have ended
			Wait(time.Second)
			_ = unix.Kill(os.Getpid(), unix.SIGKILL) // a script in the background starts it to ignore an interrupt
		}
	})
	t.Cleanup(func() {
		signal.Stop(signals)
		close(over)
		wg.Wait()
	})
}

// namespaces are those that a process has made.
func namespaces(pid int) []string {
	var own []string
	for _, ns := range allNamespaces() {
		if strings.HasPrefix(ns, fmt.Sprintf("%s-%d-", prefix, pid)) {
			own = append(own, ns)
		}
	}
	return own
}

// allNamespaces are those of all processes of the lab.
func allNamespaces() []string {
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		return nil
	}
	var all []string
	for line := range strings.Lines(string(out)) {
		if name, _, _ := strings.Cut(strings.TrimSpace(line), " "); strings.HasPrefix(name, prefix+"-") {
			all = append(all, name)
		}
	}
	return all
}

// sweep removes the namespaces of test processes that are gone.
func sweep() {
	for _, ns := range allNamespaces() {
		_, rest, _ := strings.Cut(ns, "-")
		maker, _, _ := strings.Cut(rest, "-")
		if pid, err := strconv.Atoi(maker); err == nil && unix.Kill(pid, 0) != nil {
			_ = exec.Command("ip", "netns", "del", ns).Run()
		}
	}
}

// killAll ends what runs in a namespace.
func killAll(ns string) error {
	out, err := exec.Command("ip", "netns", "pids", ns).Output()
	if err != nil {
		return fmt.Errorf("list what runs in %s: %w", ns, err)
	}
	for field := range strings.FieldsSeq(string(out)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 1 && pid != os.Getpid() {
			_ = unix.Kill(pid, unix.SIGKILL) // an error means that it has gone
		}
	}
	return nil
}
