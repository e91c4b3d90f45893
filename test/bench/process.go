package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const stopTimeout = 10 * time.Second

// A group is a program with all the processes that it starts, workers included.
// It runs as a user of its own, where this program may say so: the kernel counts
// pipes by user.
type group struct {
	name string
	cmd  *exec.Cmd
	log  *os.File
	done chan struct{}
	err  error // read after done
}

// starter starts processes from one thread that lives as long as this program:
// the signal that ends them when their parent dies is tied to the thread that
// started them (prctl(2), PR_SET_PDEATHSIG).
//
//nolint:gochecknoglobals // one for the program
var starter = sync.OnceValue(func() chan func() {
	ch := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range ch {
			f()
		}
	}()
	return ch
})

// startGroup starts a program in a folder. uid 0 is the user that this program
// runs as.
func startGroup(name, dir string, uid int, program string, args ...string) (*group, error) {
	log, err := os.OpenFile(filepath.Join(dir, "output.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	}
	started := make(chan error)
	starter() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		_ = log.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	g := &group{name: name, cmd: cmd, log: log, done: make(chan struct{})}
	go g.wait()
	return g, nil
}

func (g *group) wait() {
	defer close(g.done)
	g.err = g.cmd.Wait()
}

// stop asks the program to end, which ends what it has started, and insists.
func (g *group) stop() error {
	defer func() { _ = g.log.Close() }()
	select {
	case <-g.done:
		return nil
	default:
	}
	members, _ := g.pids()
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", g.name, err)
	}
	select {
	case <-g.done:
		return nil
	case <-time.After(stopTimeout):
	}
	for _, pid := range members { // the group's number is the leader's, who has not been waited for
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-g.done
	return fmt.Errorf("stop %s: still there after %v, killed", g.name, stopTimeout)
}

// check tells whether the program has ended by itself.
func (g *group) check() error {
	select {
	case <-g.done:
		return fmt.Errorf("%s has ended (%w): %s", g.name, g.err, g.tail())
	default:
		return nil
	}
}

// tail is the end of what the program has printed, on one line.
func (g *group) tail() string {
	b, err := os.ReadFile(g.log.Name())
	if err != nil {
		return err.Error()
	}
	if len(b) > 600 {
		b = b[len(b)-600:]
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

// pids are the processes of the group.
func (g *group) pids() ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended meanwhile
		}
		// The name of the program may hold anything: what follows it does not.
		fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil && len(fields) > 2 && string(fields[2]) == strconv.Itoa(g.cmd.Process.Pid) {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("%s has no processes: %s", g.name, g.tail())
	}
	return pids, nil
}

// sum adds up what f tells of each process.
func (g *group) sum(f func(pid int) (float64, error)) (float64, error) {
	pids, err := g.pids()
	if err != nil {
		return 0, err
	}
	total := 0.0
	for _, pid := range pids {
		n, err := f(pid)
		if err != nil {
			return 0, fmt.Errorf("process %d of %s: %w", pid, g.name, err)
		}
		total += n
	}
	return total, nil
}

// cpu is the CPU time that the group has used. It is what utime and
// stime of /proc/PID/stat add up to, threads that have ended included, in
// nanoseconds instead of ticks: the clock of the process (clock_getcpuclockid(3)).
func (g *group) cpu() (time.Duration, error) {
	total, err := g.sum(func(pid int) (float64, error) {
		const sched = 2 // CPUCLOCK_SCHED of the kernel's posix-timers.h
		var t unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|sched), &t); err != nil {
			return 0, fmt.Errorf("read CPU clock: %w", err)
		}
		return float64(t.Nano()), nil
	})
	return time.Duration(total), err
}

// pss is the group's memory in KiB, where what several processes share counts in
// parts.
func (g *group) pss() (float64, error) {
	return g.sum(func(pid int) (float64, error) { return field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:") })
}

// descriptors is how many the group has open.
func (g *group) descriptors() (float64, error) {
	return g.sum(func(pid int) (float64, error) {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		return float64(len(open)), err
	})
}

// slab is the memory of the kernel's objects that cannot be reclaimed, sockets
// among them, in KiB.
func slab() (float64, error) { return field("/proc/meminfo", "SUnreclaim:") }

// field reads a number of a file in which each line begins with a name.
func field(file, name string) (float64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if words := strings.Fields(lines.Text()); len(words) > 1 && words[0] == name {
			return strconv.ParseFloat(words[1], 64)
		}
	}
	return 0, errors.Join(lines.Err(), fmt.Errorf("%s has no %s", file, name))
}
