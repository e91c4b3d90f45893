package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// insideVariable tells a demo that it was started by another one, in a network
// namespace that is all its own.
const insideVariable = "CULVERT_DEMO_INSIDE"

// What the variable says of how it got there; "" is outside.
const (
	asRoot = "root"
	asUser = "user" // by a user namespace
)

func inside() string { return os.Getenv(insideVariable) }

// noNamespaceError is for who may not have what the federation form needs.
type noNamespaceError struct{ err error }

func (e noNamespaceError) Unwrap() error { return e.err }
func (e noNamespaceError) Error() string {
	return fmt.Sprintf(`%v
demo: hint: --federation needs network namespaces of its own: run it as root, or as a user who may make user namespaces
  (sysctl user.max_user_namespaces, and where they exist kernel.unprivileged_userns_clone and
  kernel.apparmor_restrict_unprivileged_userns; containers need --privileged as a rule); `+"`make demo` needs nothing of the kind", e.err)
}

// enter runs this program anew in a network namespace of its own, and returns the
// status that it ended with. Root needs no more; who is not becomes root in a user
// namespace, and stays who they are outside.
func enter(ctx context.Context) (int, error) {
	if _, err := exec.LookPath("ip"); err != nil {
		return 0, fmt.Errorf("%w (package iproute2)", err)
	}
	program, err := os.Executable()
	if err != nil {
		return 0, err
	}
	runtime.LockOSThread() // what it starts ends with this thread
	defer runtime.UnlockOSThread()
	ways := []string{asUser}
	if os.Geteuid() == 0 {
		ways = []string{asRoot, asUser}
	}
	var refused error
	for _, way := range ways {
		cmd := exec.CommandContext(ctx, program, os.Args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), insideVariable+"="+way)
		cmd.SysProcAttr = attributes(way)
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		if err := cmd.Start(); err != nil {
			refused = err
			continue
		}
		err := cmd.Wait()
		if state := cmd.ProcessState; state != nil && state.Exited() {
			return state.ExitCode(), nil
		}
		return 0, err
	}
	return 0, noNamespaceError{refused}
}

// attributes have a process begin in a network namespace of its own. A user
// namespace has one user, who is root there.
func attributes(way string) *syscall.SysProcAttr {
	// An interrupt on the terminal comes to this process alone, which hands it on.
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if way == asUser {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return a
}
