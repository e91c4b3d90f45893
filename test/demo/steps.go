package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const startTimeout = 10 * time.Second

// play is the whole demo, one step after the other.
func (d *demo) play(ctx context.Context) error {
	alice, bob := d.sites[0], d.sites[1]
	d.say("Two datacenters on the loopback interface, files in %s", d.dir)
	d.say("  %s", "alice's agent -> sidecar ==TLS==> gateway dc1 ==> gateway dc2 ==> sidecar -> bob's agent\n")
	err := d.perform([]act{
		{"create a CA and a certificate for each server", func() error { return d.certificates(ctx) }},
		{"check the configurations with culvert validate", func() error { return d.configure(ctx) }},
		{"start the gateways and sidecars", func() error { return d.startCulvert(ctx) }},
		{"start the serf agents, which are as they come", func() error { return d.startAgents(ctx) }},
		{d.spoiling(), d.spoil},
		{"join: serf join " + bob.advertise + " on alice's side", func() error { return d.join(ctx, alice, bob) }},
		{"members: both sides see both servers alive", func() error { return d.members(ctx) }},
		{"query: bob asks, alice answers", func() error { return d.query(ctx, bob, alice) }},
		{fmt.Sprintf("event: alice sends %d bytes, bob's handler gets each of them", eventBytes), func() error { return d.event(ctx, alice, bob) }},
		{"metrics: both sidecars and both gateways agree on what crossed", func() error { return d.agree(ctx) }},
	})
	if err != nil {
		return d.diagnose(err)
	}
	d.say("\n%s", d.membersTable(ctx))
	if d.o.stay {
		d.whatToTry()
		<-ctx.Done()
	}
	return nil
}

// spoil breaks one part before the join; a certificate has been spoilt already.
func (d *demo) spoil() error {
	if d.o.spoil == "cert" {
		return nil
	}
	return d.sites[1].processes[d.o.spoil].stop()
}

func (d *demo) certificates(ctx context.Context) error {
	if err := d.culvert(ctx, d.dir, "tls", "ca", "create"); err != nil {
		return err
	}
	for _, s := range d.sites {
		ca := d.dir
		if d.o.spoil == "cert" && s.node == "bob" {
			// bob's certificate is of a CA that nobody else knows.
			ca = filepath.Join(d.dir, "other")
			if err := os.Mkdir(ca, 0o700); err != nil {
				return err
			}
			if err := d.culvert(ctx, ca, "tls", "ca", "create"); err != nil {
				return err
			}
		}
		if err := d.culvert(ctx, ca, "tls", "cert", "create", "--server", "--dc", s.dc, "--node", s.node); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) configure(ctx context.Context) error {
	for i, s := range d.sites {
		other := d.sites[1-i]
		certDir := d.dir
		if d.o.spoil == "cert" && s.node == "bob" {
			certDir = filepath.Join(d.dir, "other")
		}
		files := map[string]string{
			s.node + "-sidecar.hcl": fmt.Sprintf(sidecarConfig, s.dc, s.node, s.server, s.advertise, s.sidecar,
				certDir, certDir, s.dc, s.node, certDir, s.dc, s.node, s.gateway, other.node, other.dc, other.advertise, s.sidecarAdmin()),
			s.node + "-gateway.hcl": fmt.Sprintf(gatewayConfig, s.dc, s.gateway, s.node, s.sidecar, other.dc, other.gateway, s.gatewayAdmin()),
			s.node + "-agent.json":  fmt.Sprintf(agentConfig, s.node, s.server, s.advertise, s.rpc, eventName, s.received, queryName, s.node),
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o600); err != nil {
				return err
			}
		}
		if err := d.culvert(ctx, d.dir, "validate", s.node+"-sidecar.hcl", s.node+"-gateway.hcl"); err != nil {
			return err
		}
	}
	return nil
}

// hairpin is off because both sites share one loopback interface: each
// server's advertised address is the other sidecar's to answer on.
const sidecarConfig = `datacenter = %q
node       = %q

server {
  profile   = "serf"
  address   = %q
  advertise = %q
  hairpin   = false
}

listen { address = %q }

tls {
  ca_file   = "%s/consul-ca.pem"
  cert_file = "%s/%s-server-consul-%s.pem"
  key_file  = "%s/%s-server-consul-%s-key.pem"
}

gateways = [%q]

peer %q {
  datacenter = %q
  advertise  = %q
}

admin { address = %q }
log {
  level  = "debug"
  format = "console"
}
`

const gatewayConfig = `datacenter = %q
node       = "gateway"
listen { address = %q }
sidecar %q { address = %q }
datacenter %q { gateways = [%q] }
admin { address = %q }
log {
  level  = "debug"
  format = "console"
}
`

func (d *demo) start(s *site, part, program string, args ...string) error {
	p, err := startProcess(nil, d.dir, s.node+"-"+part, program, args...)
	if err != nil {
		return err
	}
	s.processes[part] = p
	return nil
}

func (d *demo) startCulvert(ctx context.Context) error {
	for _, s := range d.sites {
		for _, part := range []string{"gateway", "sidecar"} {
			if err := d.start(s, part, d.o.culvert, part, "--config", s.node+"-"+part+".hcl"); err != nil {
				return err
			}
		}
	}
	for _, s := range d.sites {
		for part, admin := range map[string]string{"gateway": s.gatewayAdmin(), "sidecar": s.sidecarAdmin()} {
			if err := awaitReady(ctx, d.client, s.processes[part], admin); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *demo) startAgents(ctx context.Context) error {
	for _, s := range d.sites {
		if err := d.start(s, "agent", d.o.serf, "agent", "-config-file="+s.node+"-agent.json"); err != nil {
			return err
		}
	}
	for _, s := range d.sites {
		if err := eventually(ctx, startTimeout, func() error {
			if p := s.processes["agent"]; p.ended() {
				return fmt.Errorf("%s ended:\n%s", p.name, p.tail())
			}
			_, err := d.alive(ctx, s.agent())
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) join(ctx context.Context, from, to *site) error {
	_, err := d.serf(ctx, from.agent(), "join", to.advertise)
	return err
}

func (d *demo) members(ctx context.Context) error {
	for _, s := range d.sites {
		if err := eventually(ctx, startTimeout, func() error {
			names, err := d.alive(ctx, s.agent())
			if err == nil && len(names) != len(d.sites) {
				err = fmt.Errorf("%s sees %v alive", s.node, names)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) membersTable(ctx context.Context) string {
	var b strings.Builder
	for _, s := range d.sites {
		out, err := d.serf(ctx, s.agent(), "members")
		if err != nil {
			out = err.Error() + "\n"
		}
		fmt.Fprintf(&b, "serf members, asked of %s in %s:\n%s", s.node, s.dc, out)
	}
	return b.String()
}

// query wants the other side's answer alone: an agent sends its own to its
// advertised address, and only the hairpin, which is off here, would bring it
// back.
func (d *demo) query(ctx context.Context, from, to *site) error {
	out, err := d.serf(ctx, from.agent(), "query", "-format=json", queryName)
	if err != nil {
		return err
	}
	var answer struct{ Responses map[string]string }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return fmt.Errorf("read the answers: %w: %s", err, out)
	}
	if got, want := strings.TrimSpace(answer.Responses[to.node]), "pong from "+to.node; got != want {
		return fmt.Errorf("%s answered %q, want %q: %s", to.node, got, want, out)
	}
	return nil
}

func (d *demo) event(ctx context.Context, from, to *site) error {
	return d.sendEvent(ctx, from.agent(), to.node, to.received)
}

func (d *demo) whatToTry() {
	alice, bob := d.sites[0], d.sites[1]
	d.say(`
It keeps running until Ctrl-C. Things to try in another terminal:
  %[1]s status --admin %[2]s
  %[1]s status --admin %[3]s
  curl -s http://%[2]s/metrics | grep ^culvert_
  %[4]s members -rpc-addr=%[5]s
  %[4]s reachability -rpc-addr=%[6]s
  %[4]s event -rpc-addr=%[5]s %[7]s hello     # then: cat %[8]s
  less %[9]s/alice-sidecar.log`,
		d.o.culvert, alice.sidecarAdmin(), bob.gatewayAdmin(), d.o.serf, alice.rpc, bob.rpc, eventName, bob.received, d.dir)
}
