package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"culvert/certs"
	"culvert/sidecar"
	"culvert/test/scrape"
)

const (
	startTimeout = 20 * time.Second
	adminAddr    = "127.0.0.1:7440"
)

// A Daemon is a sidecar or a gateway on a host.
type Daemon struct {
	*Process
	host  *Host
	admin string
}

// StartCulvert starts `culvert sidecar` or `culvert gateway` with a
// configuration and waits until it is ready.
func (h *Host) StartCulvert(kind, config string) *Daemon {
	h.t.Helper()
	return h.StartAnother(kind, kind, config, adminAddr)
}

// StartAnother is StartCulvert for a host with several of a kind: each needs a
// name and an admin address of its own.
func (h *Host) StartAnother(kind, name, config, admin string) *Daemon {
	h.t.Helper()
	program := Culvert(h.t)
	file := h.WriteFile(name+".hcl", config)
	keepConfig(h.t, kind, config)
	d := h.StartDaemon("culvert-"+name, admin, program, kind, "--config", file)
	d.AwaitReady()
	return d
}

// StartDaemon starts a sidecar or a gateway by a command of the test's own.
func (h *Host) StartDaemon(name, admin, program string, args ...string) *Daemon {
	h.t.Helper()
	d := &Daemon{Process: h.Start(name, program, args...), host: h, admin: admin}
	h.daemons.add(d)
	h.t.Cleanup(h.daemons.stop)
	return d
}

// daemons are those of one network. They are stopped at once when the test ends: each
// may drain for seconds.
type daemons struct {
	mu  sync.Mutex
	all []*Daemon
}

func (ds *daemons) add(d *Daemon) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.all = append(ds.all, d)
}

// stop stops all that were added since it was called last.
func (ds *daemons) stop() {
	ds.mu.Lock()
	all := ds.all
	ds.all = nil
	ds.mu.Unlock()
	var wg sync.WaitGroup
	for _, d := range all {
		wg.Go(d.Stop)
	}
	wg.Wait()
}

// Configs is where the configurations of all end-to-end tests of this run are
// kept.
//
//nolint:gochecknoglobals // one folder for the test binary
var Configs string

// keepConfig keeps a configuration that a test has run.
func keepConfig(t testing.TB, kind, config string) {
	t.Helper()
	if Configs == "" {
		return
	}
	f, err := os.CreateTemp(Configs, kind+"-*.hcl")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(config); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the daemon as its operator does. The test fails if it had ended by
// itself before, or ends with anything but status 0. It does nothing after
// another Stop or Kill.
func (d *Daemon) Stop() {
	d.host.t.Helper()
	alone := d.Ended()
	if d.ask() {
		return
	}
	d.Process.Stop()
	switch err := d.Err(); {
	case alone:
		d.host.t.Errorf("%s on %s has ended by itself: %v", d.Name, d.host.Name, err)
	case err != nil:
		d.host.t.Errorf("%s on %s was stopped and ended with: %v", d.Name, d.host.Name, err)
	}
}

// AwaitReady waits until the daemon says that it is ready.
func (d *Daemon) AwaitReady() {
	d.host.t.Helper()
	Eventually(d.host.t, startTimeout, func() error {
		if d.Ended() {
			return fmt.Errorf("%s has ended:\n%s", d.Name, d.Tail(2000))
		}
		code, body, err := d.Get("/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%s is not ready: %s", d.Name, body)
		}
		return err
	})
}

// Get asks the admin address.
func (d *Daemon) Get(path string) (int, []byte, error) {
	return scrape.Get(context.Background(), d.host.HTTP(), d.admin, path)
}

// Metrics reads the daemon's metrics.
func (d *Daemon) Metrics() scrape.Samples {
	d.host.t.Helper()
	m, err := scrape.Metrics(context.Background(), d.host.HTTP(), d.admin)
	if err != nil {
		d.host.t.Fatal(err)
	}
	return m
}

// Status reads a sidecar's status.
func (d *Daemon) Status() sidecar.Status {
	d.host.t.Helper()
	var s sidecar.Status
	if err := scrape.Status(context.Background(), d.host.HTTP(), d.admin, &s); err != nil {
		d.host.t.Fatal(err)
	}
	return s
}

// A PKI is a CA made by culvert's own commands, in a folder of its own.
type PKI struct {
	t   testing.TB
	dir string
}

// NewPKI creates a CA.
func NewPKI(t testing.TB, domain string) *PKI {
	t.Helper()
	p := &PKI{t, t.TempDir()}
	p.run("tls", "ca", "create", "--domain", domain)
	return p
}

func (p *PKI) run(args ...string) {
	p.t.Helper()
	c := exec.Command(Culvert(p.t), args...)
	c.Dir = p.dir
	if out, err := c.CombinedOutput(); err != nil {
		p.t.Fatalf("culvert %v: %v: %s", args, err, out)
	}
}

// Server creates a server's certificate, unless it has been made before, and
// returns the tls block that uses it.
func (p *PKI) Server(dc, node, domain string) string { return p.leaf("server", dc, node, domain) }

// Gateway is Server for a gateway.
func (p *PKI) Gateway(dc, node, domain string) string { return p.leaf("gateway", dc, node, domain) }

// Source loads a certificate, made if it has to be, as a process of that role and
// name would.
func (p *PKI) Source(role, dc, node, domain string) *certs.Source {
	p.t.Helper()
	ca, name := p.files(role, dc, node, domain)
	s, err := certs.Load(certs.Options{CAFile: ca, CertFile: name + ".pem", KeyFile: name + "-key.pem", Domain: domain})
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *PKI) leaf(role, dc, node, domain string) string {
	p.t.Helper()
	ca, name := p.files(role, dc, node, domain)
	return TLSBlock(ca, name+".pem", name+"-key.pem")
}

// Files are the paths of a CA, of a certificate that it has signed, and of its key.
type Files struct{ CA, Cert, Key string }

// Files returns the files of a server's certificate, made if it has to be: the
// very ones that its sidecar uses.
func (p *PKI) Files(dc, node, domain string) *Files {
	p.t.Helper()
	ca, name := p.files("server", dc, node, domain)
	return &Files{ca, name + ".pem", name + "-key.pem"}
}

// files returns the CA's file, and a certificate's without its suffix.
func (p *PKI) files(role, dc, node, domain string) (ca, name string) {
	p.t.Helper()
	name = filepath.Join(p.dir, fmt.Sprintf("%s-%s-%s-%s", dc, role, domain, node))
	if _, err := os.Stat(name + ".pem"); err != nil {
		p.run("tls", "cert", "create", "--"+role, "--dc", dc, "--node", node, "--domain", domain)
	}
	return filepath.Join(p.dir, domain+"-ca.pem"), name
}

// TLSBlock is the tls block for three files.
func TLSBlock(ca, cert, key string) string {
	return fmt.Sprintf("tls {\n  ca_file = %q\n  cert_file = %q\n  key_file = %q\n}\n", ca, cert, key)
}

// HostPort joins an address and a port.
func HostPort(addr fmt.Stringer, port int) string {
	return net.JoinHostPort(addr.String(), fmt.Sprint(port))
}
