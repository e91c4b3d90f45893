package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"culvert/test/scrape"
)

type options struct {
	culvert, serf string
	spoil         string
	stay          bool
	federation    bool
}

// parts are what can be spoilt.
func (o *options) parts() []string {
	parts := []string{"gateway", "sidecar", "cert"}
	if o.federation {
		parts = append(parts, "record")
	}
	return parts
}

func (o *options) check() error {
	for _, program := range []*string{&o.culvert, &o.serf} {
		if *program == "" {
			return errors.New("--culvert and --serf are required: `make demo` gives them")
		}
		abs, err := filepath.Abs(*program)
		if err != nil {
			return err
		}
		if _, err := os.Stat(abs); err != nil {
			return fmt.Errorf("%w: `make demo` builds it", err)
		}
		*program = abs
	}
	if o.spoil != "" && !slices.Contains(o.parts(), o.spoil) {
		return fmt.Errorf("--break %q: want one of %s", o.spoil, strings.Join(o.parts(), ", "))
	}
	return nil
}

// A site is one datacenter of the demo: a server, its sidecar and a gateway.
type site struct {
	dc, node  string
	advertise string // the server's address in both datacenters
	server    string // where it really listens
	rpc       string // the agent's control address
	sidecar   string // host; port 8443 takes TLS, 7440 is admin
	gateway   string
	received  string // the file that its event handler writes

	processes map[string]*process // agent, sidecar, gateway
}

func (s *site) sidecarAdmin() string { return s.sidecar + ":7440" }
func (s *site) gatewayAdmin() string { return s.gateway + ":7440" }
func (s *site) agent() agent         { return agent{nil, s.rpc} }

// A demo is one run: a folder, a range of loopback addresses, two sites.
type demo struct {
	stage
	claim  net.Listener // holds the address range
	sites  [2]*site
	client *http.Client
}

func newDemo(o options, out io.Writer) (*demo, error) {
	st, err := newStage(o, out)
	if err != nil {
		return nil, err
	}
	d := &demo{
		stage:  st,
		client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}},
	}
	base, err := d.claimRange()
	if err != nil {
		_ = os.RemoveAll(d.dir)
		return nil, err
	}
	for i, node := range []string{"alice", "bob"} {
		at := func(host int) string { return fmt.Sprintf("%s.%d.%d", base, i+1, host) }
		d.sites[i] = &site{
			dc: fmt.Sprintf("dc%d", i+1), node: node, advertise: at(1),
			gateway: at(250), sidecar: at(251), server: at(252), rpc: at(252) + ":7373",
			received: filepath.Join(d.dir, node+".event"), processes: make(map[string]*process),
		}
	}
	return d, nil
}

// claimRange finds a 127.N.0.0/16 that no other demo uses: all of 127.0.0.0/8
// is local on Linux.
func (d *demo) claimRange() (string, error) {
	var err error
	for n := 77; n < 127; n++ {
		base := fmt.Sprintf("127.%d", n)
		if d.claim, err = net.Listen("tcp", base+".0.1:8443"); err == nil {
			return base, nil
		}
	}
	return "", fmt.Errorf("find a free loopback range: %w", err)
}

// close stops what runs, in the reverse order of the start, and removes the
// files.
func (d *demo) close() error {
	var errs []error
	for _, part := range []string{"agent", "sidecar", "gateway"} {
		for _, s := range d.sites {
			if p := s.processes[part]; p != nil {
				errs = append(errs, p.stop())
			}
		}
	}
	_ = d.claim.Close()
	errs = append(errs, os.RemoveAll(d.dir))
	return errors.Join(errs...)
}

// diagnose adds what the sidecars and the logs say to a failed step.
func (d *demo) diagnose(err error) error {
	var b strings.Builder
	for _, s := range d.sites {
		for _, part := range []string{"gateway", "sidecar", "agent"} {
			if p := s.processes[part]; p != nil && p.ended() {
				fmt.Fprintf(&b, "\n  the %s of %s is not running", part, s.dc)
			}
		}
		var st struct {
			Peers []struct {
				Datacenter, Node, State string
				LastError               string `json:"last_error"`
			}
		}
		if scrape.Status(context.Background(), d.client, s.sidecarAdmin(), &st) != nil {
			continue
		}
		for _, p := range st.Peers {
			fmt.Fprintf(&b, "\n  %s's sidecar says of %s/%s: %s %s", s.node, p.Datacenter, p.Node, p.State, p.LastError)
		}
	}
	return fmt.Errorf("%w%s", err, b.String())
}
