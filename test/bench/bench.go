package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The identities of the two ends, and what the peer asks the sidecar for.
const (
	serverName = "alice.server.dc1.consul"
	opaqueName = "opaque.server.dc1.consul"
	secureName = "secure.server.dc1.consul"
	protocol   = "culvert/stream/1/bench"
)

const commandTimeout = 10 * time.Second

// A bench is what all topics share.
type bench struct {
	dir     string
	culvert string
	started int    // proxies, so far
	peers   []peer // measured so far

	certificates map[string]string // the files that each proxy gets
	server       tls.Certificate
	client       tls.Certificate
	roots        *x509.CertPool
}

func newBench(ctx context.Context, culvert string) (*bench, error) {
	if err := raiseLimit(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "culvert-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{dir: dir}
	if err := b.prepare(ctx, culvert); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func (b *bench) close() error { return os.RemoveAll(b.dir) }

// raiseLimit lets this program and what it starts have as many descriptors as
// they may.
func raiseLimit() error {
	const needed = 8192
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit on descriptors: %w", err)
	}
	if limit.Max < needed {
		return fmt.Errorf("this needs %d descriptors, and may have %d: see ulimit -n", needed, limit.Max)
	}
	limit.Cur = limit.Max
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

// prepare makes the program readable for users of all kinds, and certificates.
func (b *bench) prepare(ctx context.Context, culvert string) error {
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return err
	}
	program, err := os.ReadFile(culvert)
	if err != nil {
		return fmt.Errorf("%w: `make build` makes it", err)
	}
	b.culvert = filepath.Join(b.dir, "culvert")
	if err := os.WriteFile(b.culvert, program, 0o755); err != nil {
		return err
	}
	for _, args := range []string{
		"ca create", "cert create --server --dc dc1 --node alice", "cert create --server --dc dc2 --node bob",
	} {
		if _, err := b.output(ctx, b.culvert, strings.Fields("tls "+args)...); err != nil {
			return err
		}
	}
	return b.readCertificates()
}

// newStorm is a bench that has nothing but the certificates of another.
func newStorm(dir string) (*bench, error) {
	b := &bench{dir: dir}
	return b, b.readCertificates()
}

func (b *bench) readCertificates() error {
	const alice, bob = "dc1-server-consul-alice", "dc2-server-consul-bob"
	pem := make(map[string]string)
	for name, file := range map[string]string{
		"ca.pem": "consul-ca.pem", "cert.pem": alice + ".pem", "key.pem": alice + "-key.pem",
		"bob": bob + ".pem", "bob-key": bob + "-key.pem",
	} {
		text, err := os.ReadFile(filepath.Join(b.dir, file))
		if err != nil {
			return err
		}
		pem[name] = string(text)
	}
	b.certificates = map[string]string{
		"ca.pem": pem["ca.pem"], "cert.pem": pem["cert.pem"], "key.pem": pem["key.pem"], "both.pem": pem["cert.pem"] + pem["key.pem"],
	}
	b.roots = x509.NewCertPool()
	if !b.roots.AppendCertsFromPEM([]byte(pem["ca.pem"])) {
		return errors.New("the CA's file holds no certificate")
	}
	var err error
	if b.server, err = tls.X509KeyPair([]byte(pem["cert.pem"]), []byte(pem["key.pem"])); err != nil {
		return err
	}
	b.client, err = tls.X509KeyPair([]byte(pem["bob"]), []byte(pem["bob-key"]))
	return err
}

// output runs a program in the bench's folder and returns what it printed.
func (b *bench) output(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = b.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// describe tells where this is and what is compared.
func (b *bench) describe(ctx context.Context) string {
	parts := []string{fmt.Sprintf("%d cores", runtime.NumCPU()), runtime.Version()}
	var kernel unix.Utsname
	if unix.Uname(&kernel) == nil {
		parts = append(parts, "Linux "+unix.ByteSliceToString(kernel.Release[:]))
	}
	for _, program := range [][]string{{"haproxy", "-v"}, {"nginx", "-v"}, {"stunnel4", "-version"}} {
		version, err := b.output(ctx, program[0], program[1:]...)
		if err != nil {
			version = program[0] + " is missing"
		}
		for line := range strings.Lines(version) {
			if strings.Contains(strings.ToLower(line), strings.TrimRight(program[0], "4")) {
				line, _, _ = strings.Cut(strings.TrimSpace(line), " - ")
				parts = append(parts, line)
				break
			}
		}
	}
	if os.Getuid() != 0 {
		parts = append(parts, "not root: all proxies are one user, and share its limit on pipes")
	}
	return strings.Join(parts, "; ")
}

// peerConfig is how a peer dials: by the CA and with a certificate of its own, and
// X25519 on all sides unless groups says otherwise.
func (b *bench) peerConfig(groups ...tls.CurveID) *tls.Config {
	if len(groups) == 0 {
		groups = []tls.CurveID{tls.X25519}
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: serverName, RootCAs: b.roots, Certificates: []tls.Certificate{b.client},
		NextProtos: []string{protocol}, CurvePreferences: groups,
	}
}
