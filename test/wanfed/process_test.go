package wanfed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const stopTimeout = 15 * time.Second

// culvert is the program under test.
func culvert(t testing.TB) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/culvert")
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("no program to test: %v; `make wanfed` builds it", err)
	}
	return path
}

// starter starts processes from one thread that lives as long as the test
// binary: the signal that ends them when their parent dies is tied to the
// thread that started them (prctl(2), PR_SET_PDEATHSIG).
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

// A daemon is a running sidecar or gateway.
type daemon struct {
	t     testing.TB
	name  string
	admin string
	cmd   *exec.Cmd
	done  chan struct{}
	err   error // how it ended; read after done
	stop  sync.Once
	log   string // file
}

// start runs `culvert sidecar` or `culvert gateway` until the test ends, and waits
// until it is ready.
func start(t testing.TB, name, admin, kind, config string) *daemon {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, name+".hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, name: name, admin: admin, done: make(chan struct{}), log: filepath.Join(dir, name+".log")}
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	d.cmd = exec.Command(culvert(t), kind, "--config", file)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	starter() <- func() { started <- d.cmd.Start() }
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go d.wait()
	t.Cleanup(func() {
		d.Stop()
		if t.Failed() {
			t.Logf("%s ended with:\n%s", name, d.tail(6000))
		}
	})
	eventually(t, func() error {
		select {
		case <-d.done:
			t.Fatalf("%s has ended: %v\n%s", name, d.err, d.tail(3000))
		default:
		}
		_, err := d.get("/readyz")
		return err
	})
	return d
}

func (d *daemon) wait() {
	defer close(d.done)
	d.err = d.cmd.Wait()
}

// Stop ends the process as its operator does. The test fails where it had ended
// before, or ends with anything but status 0.
func (d *daemon) Stop() {
	d.t.Helper()
	d.stop.Do(func() {
		select {
		case <-d.done:
			d.t.Errorf("%s has ended by itself: %v", d.name, d.err)
			return
		default:
		}
		_ = d.cmd.Process.Signal(syscall.SIGTERM) // gone already otherwise
		select {
		case <-d.done:
		case <-time.After(stopTimeout):
			d.t.Errorf("%s did not stop within %v", d.name, stopTimeout)
			_ = d.cmd.Process.Kill()
			<-d.done
		}
		if d.err != nil {
			d.t.Errorf("%s was stopped and ended with: %v", d.name, d.err)
		}
	})
}

// tail is the last n bytes of what the process printed.
func (d *daemon) tail(n int) string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// get reads a path on the admin address.
func (d *daemon) get(path string) ([]byte, error) {
	client := http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + d.admin + path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s of %s: %s: %s", path, d.name, resp.Status, body)
	}
	return body, err
}

// metric sums the values of a metric over the lines that have all of the labels,
// each as name="value".
func (d *daemon) metric(name string, labels ...string) float64 {
	d.t.Helper()
	body, err := d.get("/metrics")
	if err != nil {
		d.t.Fatal(err)
	}
	sum, found := 0.0, false
	for line := range strings.Lines(string(body)) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		of, all, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
		has := strings.Split(all, ",")
		if of != name || slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(has, l) }) {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			d.t.Fatalf("metric %q: %v", line, err)
		}
		sum, found = sum+v, true
	}
	if !found && len(labels) == 0 {
		d.t.Fatalf("%s has no metric %s", d.name, name)
	}
	return sum
}

// peer is what the status of a sidecar says of one peer.
type peer struct {
	Node            string            `json:"node"`
	Path            string            `json:"path"`
	State           string            `json:"state"`
	PacketsSent     uint64            `json:"packets_sent"`
	PacketsReceived uint64            `json:"packets_received"`
	Drops           map[string]uint64 `json:"drops"`
	LastError       string            `json:"last_error"`
}

func (d *daemon) peer(node string) peer {
	d.t.Helper()
	body, err := d.get("/v1/status")
	if err != nil {
		d.t.Fatal(err)
	}
	var status struct {
		Peers []peer `json:"peers"`
	}
	if err := json.Unmarshal(body, &status); err != nil {
		d.t.Fatal(err)
	}
	for _, p := range status.Peers {
		if p.Node == node {
			return p
		}
	}
	d.t.Fatalf("the status of %s lacks %s: %s", d.name, node, body)
	return peer{}
}

// run runs a command of culvert's in a folder, and returns what it printed.
func run(t testing.TB, dir string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(culvert(t), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(bytes.TrimSpace(out)), err
}
