package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

//go:embed conf
var configurations embed.FS

const startTimeout = 10 * time.Second

// A kind is a program in one role.
type kind struct {
	name    string // in the tables
	program string // to be found in PATH, or a path
	debian  string // the packages that have it
	conf    string // its configuration, in conf
	args    []string
	splice  bool
}

// The gateways that are compared, and the sidecars. CONF is the configuration.
func gatewayKinds(culvert string) []kind {
	return []kind{
		{name: rowCulvert, program: culvert, conf: "gateway.hcl", args: []string{"gateway", "--config", "CONF"}},
		{name: rowHAProxy, program: "haproxy", debian: "haproxy", conf: "haproxy-gateway.cfg", args: []string{"-db", "-f", "CONF"}},
		{name: rowNginx, program: "nginx", debian: "nginx libnginx-mod-stream", conf: "nginx-gateway.conf", args: nginxArgs()},
		{name: rowSplicing, program: "haproxy", debian: "haproxy", conf: "haproxy-gateway.cfg", args: []string{"-db", "-f", "CONF"}, splice: true},
	}
}

func sidecarKinds(culvert string) []kind {
	return []kind{
		{name: rowCulvert, program: culvert, conf: "sidecar.hcl", args: []string{"sidecar", "--config", "CONF"}},
		{name: rowHAProxy, program: "haproxy", debian: "haproxy", conf: "haproxy-terminate.cfg", args: []string{"-db", "-f", "CONF"}},
		{name: rowNginx, program: "nginx", debian: "nginx libnginx-mod-stream", conf: "nginx-terminate.conf", args: nginxArgs()},
		{name: rowStunnel, program: "stunnel4", debian: "stunnel4", conf: "stunnel.conf", args: []string{"CONF"}},
	}
}

func nginxArgs() []string { return []string{"-e", "stderr", "-p", ".", "-c", "CONF"} }

// The rows of the tables.
const (
	rowCulvert  = "Culvert"
	rowHAProxy  = "HAProxy"
	rowNginx    = "nginx"
	rowStunnel  = "stunnel"
	rowSplicing = "HAProxy, splicing, pipes of 1 MiB"
)

// settings are what the configurations are made with.
type settings struct {
	Dir, Listen, Admin string
	Splice             bool
	Modules            string // nginx's

	OpaqueName, SecureName string
	Opaque, Secure         string

	Local   string
	Port    int // of a service that nobody dials
	Peer    string
	Packets string
}

// A proxy is one that runs.
type proxy struct {
	*group
	address string
}

// start starts a proxy in a folder and as a user of its own, and waits until it
// takes connections.
func (b *bench) start(ctx context.Context, k kind, s settings) (*proxy, error) {
	program, err := exec.LookPath(k.program)
	if err != nil {
		return nil, fmt.Errorf("%w: Debian has it in %s", err, k.debian)
	}
	if program, err = filepath.Abs(program); err != nil {
		return nil, err
	}
	b.started++
	dir := filepath.Join(b.dir, fmt.Sprintf("%d-%s", b.started, filepath.Base(program)))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s.Dir, s.Splice, s.Modules = dir, k.splice, "/usr/lib/nginx/modules"
	if s.Listen, err = freeAddress(); err != nil {
		return nil, err
	}
	if s.Admin, err = freeAddress(); err != nil {
		return nil, err
	}
	conf, err := b.furnish(dir, k, s)
	if err != nil {
		return nil, err
	}
	args := strings.Split(strings.ReplaceAll(strings.Join(k.args, "\x00"), "CONF", conf), "\x00")
	g, err := startGroup(k.name, dir, b.user(dir), program, args...)
	if err != nil {
		return nil, err
	}
	p := &proxy{group: g, address: s.Listen}
	if err := p.await(ctx); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// furnish writes a proxy's files.
func (b *bench) furnish(dir string, k kind, s settings) (conf string, err error) {
	t, err := template.ParseFS(configurations, "conf/"+k.conf)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	if err := t.Execute(&text, s); err != nil {
		return "", err
	}
	conf = filepath.Join(dir, k.conf)
	files := map[string]string{conf: text.String()}
	for name, content := range b.certificates {
		files[filepath.Join(dir, name)] = content
	}
	for name, content := range files {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return "", err
		}
	}
	return conf, nil
}

// user gives a folder and what is in it to an ordinary user of its own, and
// returns that; 0, where this program may not.
func (b *bench) user(dir string) int {
	if os.Getuid() != 0 {
		return 0
	}
	const first = 61_000 // of the numbers that Debian leaves free
	uid := first + b.started
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, uid, uid))
	})
	if err != nil {
		return 0
	}
	return uid
}

// await waits until connections are taken.
func (p *proxy) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		c, err := dial(ctx, nil, p.address)
		if err == nil {
			return c.Close()
		}
		if ended := p.check(); ended != nil {
			return ended
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s takes no connections: %w", p.name, err)
		}
	}
}

// used returns the CPU time that a load costs the proxy, and how long it took.
func (p *proxy) used(load func() error) (cpu, took time.Duration, err error) {
	before, err := p.cpu()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := load(); err != nil {
		return 0, 0, errors.Join(err, p.check())
	}
	took = time.Since(began)
	time.Sleep(20 * time.Millisecond) // the last connections end
	after, err := p.cpu()
	return after - before, took, err
}

// freeAddress finds a port below those that the kernel gives to clients. Programs
// that cannot say which they have been given need to be told one.
func freeAddress() (string, error) {
	var last error
	for range 50 {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(10_000)))
		if err == nil {
			return ln.Addr().String(), ln.Close()
		}
		last = err
	}
	return "", last
}
