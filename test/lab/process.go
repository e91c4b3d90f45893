package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	stopTimeout    = 15 * time.Second
	commandTimeout = 20 * time.Second
)

// A Process is a program that runs on a host.
type Process struct {
	Name string
	host *Host
	args []string
	path string // of its output

	mu    sync.Mutex
	cmd   *exec.Cmd
	done  chan struct{}
	asked bool  // to end, by Stop, Kill or Signal
	err   error // how it ended; read after done
}

// starter starts processes from one thread that lives as long as the test
// binary: the signal that ends them when their parent dies is tied to the
// thread that started them (prctl(2), PR_SET_PDEATHSIG).
//
//nolint:gochecknoglobals // one for the test binary
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

// Start runs a program on the host until the test ends or it is stopped. Its
// output goes to a file, whose end is logged if the test fails.
func (h *Host) Start(name, program string, args ...string) *Process {
	h.t.Helper()
	p := &Process{Name: name, host: h, args: append([]string{"netns", "exec", h.NS, program}, args...), path: filepath.Join(h.Dir, name+".log")}
	p.Again()
	h.t.Cleanup(func() {
		p.Stop()
		if h.t.Failed() {
			h.t.Logf("%s on %s ended with:\n%s", name, h.Name, p.Tail(4000))
		}
	})
	return p
}

// Again starts a process that has ended.
func (p *Process) Again() {
	p.host.t.Helper()
	log, err := os.OpenFile(p.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		p.host.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command("ip", p.args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.host.Dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	starter() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		p.host.t.Fatalf("start %s on %s: %v", p.Name, p.host.Name, err)
	}
	done := make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd, p.done, p.asked, p.err = cmd, done, false, nil
	go p.wait(cmd, done)
}

func (p *Process) wait(cmd *exec.Cmd, done chan<- struct{}) {
	defer close(done)
	err := cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

// ask notes that the process is to end, and tells whether that was so before.
func (p *Process) ask() (before bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, p.asked = p.asked, true
	return before
}

// Err is how the process ended: nil with status 0, and while it runs.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *Process) running() (*exec.Cmd, chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd, p.done
}

// PID is the process's number: ip(8) becomes the program that it starts.
func (p *Process) PID() int {
	cmd, _ := p.running()
	return cmd.Process.Pid
}

// Ended tells whether the process has gone.
func (p *Process) Ended() bool {
	_, done := p.running()
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// Kill ends the process with SIGKILL and waits for it.
func (p *Process) Kill() {
	p.ask()
	cmd, done := p.running()
	_ = cmd.Process.Kill() // an error means that it has gone
	<-done
}

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) {
	p.host.t.Helper()
	if s == syscall.SIGTERM || s == syscall.SIGINT || s == syscall.SIGKILL {
		p.ask()
	}
	cmd, _ := p.running()
	if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.host.t.Errorf("signal %s: %v", p.Name, err)
	}
}

// Stop ends the process with SIGTERM. If that takes too long it is an error, and
// the process is made to say in its output what it waits for, as a program of Go's
// does at SIGQUIT, before it is killed.
func (p *Process) Stop() {
	p.host.t.Helper()
	p.Signal(syscall.SIGTERM)
	_, done := p.running()
	select {
	case <-done:
	case <-time.After(stopTimeout):
		p.host.t.Errorf("%s on %s did not stop within %v", p.Name, p.host.Name, stopTimeout)
		p.Signal(syscall.SIGQUIT)
		select {
		case <-done:
		case <-time.After(time.Second):
		}
		p.host.t.Log(p.Output())
		p.Kill()
	}
}

// Output is all that the process has printed.
func (p *Process) Output() string {
	b, err := os.ReadFile(p.path)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Tail is the last n bytes of the output, from a line's beginning.
func (p *Process) Tail(n int) string {
	b := []byte(p.Output())
	if len(b) > n {
		b = b[len(b)-n:]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return string(b)
}

// Run runs a program on the host to its end and returns what it printed.
func (h *Host) Run(program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.NS, program}, args...)...)
	cmd.Dir = h.Dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %v on %s: %w: %s", filepath.Base(program), args, h.Name, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// Eventually calls f until it returns nil; the test fails with its last error
// if that takes longer than limit. It returns how long it took. The pauses between
// calls grow to a tenth of that, as many an f starts a program.
func Eventually(t testing.TB, limit time.Duration, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := f()
		took := time.Since(began)
		if err == nil {
			return took
		}
		if took > limit {
			t.Fatalf("not within %v: %v", limit, err)
		}
		Wait(min(max(took/10, 20*time.Millisecond), 200*time.Millisecond))
	}
}

// Wait lets time pass, where that is what the test is about.
func Wait(d time.Duration) { <-time.After(d) }
