package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"culvert/federation/state"
	"culvert/test/scrape"
)

const (
	datacenters = 3
	soon        = 5 * time.Second // how long the federation may take for one change
)

// A federation is the form in which nobody is told a peer: three datacenters that
// find each other, each host in a network namespace.
type federation struct {
	stage
	machines []*machine
	started  []*process
}

func newFederation(o options, out io.Writer) (*federation, error) {
	st, err := newStage(o, out)
	if err != nil {
		return nil, err
	}
	f := &federation{stage: st}
	for _, m := range []struct {
		dc, n int
		node  string
	}{{1, 0, "gw"}, {2, 0, "gw"}, {3, 0, "gw"}, {1, 1, "alice"}, {2, 1, "bob"}, {3, 1, "carol"}, {2, 2, "dave"}} {
		if _, err := f.addMachine(m.dc, m.n, m.node); err != nil {
			return nil, errors.Join(err, f.close())
		}
	}
	return f, nil
}

func (f *federation) server(node string) *machine {
	return f.machines[slices.IndexFunc(f.machines, func(m *machine) bool { return m.node == node })]
}

func (f *federation) play(ctx context.Context) error {
	alice, bob, carol, dave := f.server("alice"), f.server("bob"), f.server("carol"), f.server("dave")
	three := []*machine{alice, bob, carol}
	f.say("Three datacenters in network namespaces, files in %s", f.dir)
	f.say("  dc1: alice, who keeps the records    dc2: bob, and later dave    dc3: carol")
	f.say("No peer is configured, and of all gateways the primary's alone. What bob's sidecar is told of the others:")
	f.say("\n%s", indent(bob.block()))
	err := f.perform([]act{
		{"build the networks: servers have a way to gateways, and none to servers elsewhere", func() error { return f.wire(ctx) }},
		{"create a CA, and a certificate for each server and gateway", func() error { return f.certificates(ctx) }},
		{"check the configurations with culvert validate", func() error { return f.configure(ctx) }},
		{"start the gateways, sidecars and serf agents, those of dc1 last", func() error { return f.startAll(ctx, three) }},
		{"find: each sidecar knows all servers by itself", func() error { return f.find(ctx, three) }},
		{f.spoiling(), f.spoil},
		{"join: serf join of bob and carol on alice's side, all see all alive", func() error { return f.join(ctx, three, alice, bob, carol) }},
		{"explain: culvert explain dc2/bob --probe on alice's side", func() error { return f.explain(ctx, alice, bob) }},
		{"add: dave appears in dc2, and within 5 s alice's agent joins him", func() error { return f.add(ctx, dave, alice) }},
		{"leave: dave says farewell, and within 5 s nothing of him is left in dc1", func() error { return f.leave(ctx, dave, alice) }},
		{"primary down: without alice, carol's sidecar starts anew with all it knew", func() error { return f.without(ctx, alice, carol, bob) }},
		{"event: alice's sidecar is still down, and what bob sends reaches carol", func() error { return f.sendEvent(ctx, bob.agent(), carol.node, carol.received) }},
	})
	if err != nil {
		return f.diagnose(context.WithoutCancel(ctx), err)
	}
	if f.o.stay {
		f.whatToTry(bob)
		<-ctx.Done()
	}
	return nil
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n  ") + "\n"
}

func (f *federation) start(m *machine, part, program string, args ...string) error {
	p, err := startProcess(m.host, f.dir, m.file(part), program, args...)
	if err != nil {
		return err
	}
	m.processes[part] = p
	f.started = append(f.started, p)
	return nil
}

func (f *federation) startCulvert(m *machine) error {
	return f.start(m, m.kind(), f.o.culvert, m.kind(), "--config", m.file(m.kind()+".hcl"))
}

func (f *federation) ready(ctx context.Context, m *machine) error {
	return awaitReady(ctx, m.client, m.processes[m.kind()], adminAddress)
}

// startAll starts all gateways and some servers. None waits for another, so that
// the primary's may be the last ones.
func (f *federation) startAll(ctx context.Context, servers []*machine) error {
	for dc := datacenters; dc >= 1; dc-- {
		for _, m := range f.machines {
			if m.dc != dc || !m.gateway && !slices.Contains(servers, m) {
				continue
			}
			if err := f.startCulvert(m); err != nil {
				return err
			}
		}
	}
	for _, m := range servers {
		if err := f.startAgent(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

func (f *federation) startAgent(ctx context.Context, m *machine) error {
	if err := f.start(m, "agent", f.o.serf, "agent", "-config-file="+m.file("agent.json")); err != nil {
		return err
	}
	return eventually(ctx, startTimeout, func() error {
		if p := m.processes["agent"]; p.ended() {
			return fmt.Errorf("%s ended:\n%s", p.name, p.tail())
		}
		_, err := f.alive(ctx, m.agent())
		return err
	})
}

// find waits until all servers are known everywhere, and shows the records.
func (f *federation) find(ctx context.Context, servers []*machine) error {
	for _, m := range f.machines {
		if m.processes[m.kind()] == nil {
			continue
		}
		if err := f.ready(ctx, m); err != nil {
			return err
		}
		if err := eventually(ctx, startTimeout, func() error { return m.complete(ctx) }); err != nil {
			return err
		}
	}
	for _, m := range servers {
		if err := eventually(ctx, startTimeout, func() error { return m.knows(ctx, servers...) }); err != nil {
			return err
		}
	}
	out, err := command(ctx, servers[0].host, f.dir, f.o.culvert, "federation", "list")
	f.say("\n%s", indent("$ culvert federation list\n"+out))
	return err
}

// complete tells what is wrong unless what a process has read is one server and one
// gateway of each datacenter.
func (m *machine) complete(ctx context.Context) error {
	_, body, err := scrape.Get(ctx, m.client, adminAddress, "/v1/federation-states")
	if err != nil {
		return err
	}
	var records []state.Record
	if err := json.Unmarshal(body, &records); err != nil {
		return fmt.Errorf("read the records: %w: %s", err, body)
	}
	if len(records) != datacenters {
		return fmt.Errorf("%s has read records of %d datacenters, want %d", m.key(), len(records), datacenters)
	}
	for _, r := range records {
		if len(r.Servers) != 1 || len(r.Gateways) != 1 {
			return fmt.Errorf("%s has read of %d servers and %d gateways of %s, want one each", m.key(), len(r.Servers), len(r.Gateways), r.Datacenter)
		}
	}
	return nil
}

// status is what is read of what a sidecar or a gateway says.
type status struct {
	Peers []struct {
		Datacenter, Node, State string
		Critical                bool
		LastError               string `json:"last_error"`
	}
	Federation struct {
		LastError         string `json:"last_error"`
		RegistrationError string `json:"registration_error"`
	}
}

func (m *machine) status(ctx context.Context) (st status, err error) {
	err = scrape.Status(ctx, m.client, adminAddress, &st)
	return st, err
}

// knows tells what is wrong unless a sidecar has exactly these servers besides its
// own.
func (m *machine) knows(ctx context.Context, servers ...*machine) error {
	st, err := m.status(ctx)
	if err != nil {
		return err
	}
	var have, want []string
	for _, p := range st.Peers {
		have = append(have, p.Datacenter+"/"+p.Node)
	}
	for _, s := range servers {
		if s != m {
			want = append(want, s.key())
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fmt.Errorf("%s's sidecar knows %v, want %v", m.key(), have, want)
	}
	return nil
}

// spoil stops a part of dc2; certificates and records have been spoilt already.
func (f *federation) spoil() error {
	for _, m := range f.machines {
		if p := m.processes[f.o.spoil]; p != nil && m.dc == 2 {
			return p.stop()
		}
	}
	return nil
}

// join joins agents to one, and waits until all of some see each other.
func (f *federation) join(ctx context.Context, all []*machine, one *machine, others ...*machine) error {
	for _, m := range others {
		if err := f.reach(ctx, one, m); err != nil {
			return err
		}
	}
	for _, m := range all {
		if err := eventually(ctx, startTimeout, func() error {
			names, err := f.alive(ctx, m.agent())
			if err == nil && len(names) != len(all) {
				err = fmt.Errorf("%s sees %v alive", m.node, names)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// explain shows the way from one server to another, which nobody has configured.
func (f *federation) explain(ctx context.Context, from, to *machine) error {
	args := []string{"explain", to.key(), "--probe"}
	text, err := command(ctx, from.host, f.dir, f.o.culvert, args...)
	if err != nil {
		return err
	}
	f.say("\n%s", indent("$ culvert "+strings.Join(args, " ")+"\n"+text))
	out, err := command(ctx, from.host, f.dir, f.o.culvert, append(args, "--json")...)
	if err != nil {
		return err
	}
	var answer struct {
		Source string
		Path   struct {
			Candidates []struct {
				Kind, Address string
				Configured    bool
			}
		}
		Probe []struct {
			Step, Detail string
			OK           bool
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return fmt.Errorf("read the explanation: %w", err)
	}
	if len(answer.Probe) != 3 || answer.Source != "federation" || len(answer.Path.Candidates) == 0 {
		return fmt.Errorf("the explanation has %d steps and is by %s, want 3 by the federation: %s", len(answer.Probe), answer.Source, out)
	}
	for _, c := range answer.Path.Candidates {
		if c.Kind == "remote" && c.Configured {
			return fmt.Errorf("a gateway of %s is configured: %s", to.datacenter(), c.Address)
		}
	}
	for _, p := range answer.Probe {
		if !p.OK {
			return fmt.Errorf("the probe's step %s: %s", p.Step, p.Detail)
		}
	}
	return nil
}

// add starts a server while all others run, and has another's agent reach it.
func (f *federation) add(ctx context.Context, added, from *machine) error {
	if err := f.startAgent(ctx, added); err != nil {
		return err
	}
	if err := f.startCulvert(added); err != nil {
		return err
	}
	return f.reach(ctx, from, added)
}

// reach has one agent join another. A gateway may read of it a moment later than
// the sidecar.
func (f *federation) reach(ctx context.Context, from, to *machine) error {
	return eventually(ctx, soon, func() error {
		_, err := f.serf(ctx, from.agent(), "join", to.advertise)
		return err
	})
}

// leave has a server say farewell to its agents and to the federation. Another's
// sidecar gives up its address then: connections are refused.
func (f *federation) leave(ctx context.Context, gone, from *machine) error {
	if _, err := f.serf(ctx, gone.agent(), "leave"); err != nil {
		return err
	}
	if _, err := command(ctx, gone.host, f.dir, f.o.culvert, "federation", "leave", "--config", gone.file("sidecar.hcl")); err != nil {
		return err
	}
	return eventually(ctx, soon, func() error {
		if err := from.knows(ctx, f.server("alice"), f.server("bob"), f.server("carol")); err != nil {
			return err
		}
		return from.failsToDial(ctx, gone.advertise+":7946", syscall.ECONNREFUSED)
	})
}

// without stops the sidecar that keeps the records, and starts another one anew,
// which has them on its disk.
func (f *federation) without(ctx context.Context, primary, anew, other *machine) error {
	if err := primary.processes["sidecar"].stop(); err != nil {
		return err
	}
	if err := anew.processes["sidecar"].stop(); err != nil {
		return err
	}
	if err := f.startCulvert(anew); err != nil {
		return err
	}
	if err := f.ready(ctx, anew); err != nil {
		return err
	}
	return eventually(ctx, soon, func() error { return anew.knows(ctx, primary, anew, other) })
}

// close stops what runs, in the reverse order of the start, and removes the hosts
// and the files.
func (f *federation) close() error {
	var errs []error
	for _, p := range slices.Backward(f.started) {
		errs = append(errs, p.stop())
	}
	for _, m := range f.machines {
		m.close()
	}
	return errors.Join(append(errs, os.RemoveAll(f.dir))...)
}

// diagnose adds what the processes say to a failed step.
func (f *federation) diagnose(ctx context.Context, err error) error {
	var b strings.Builder
	for _, m := range f.machines {
		for part, p := range m.processes {
			if p.ended() {
				fmt.Fprintf(&b, "\n  the %s of %s is not running", part, m.key())
			}
		}
		st, statusErr := m.status(ctx)
		if statusErr != nil {
			continue
		}
		who := fmt.Sprintf("%s of %s", m.kind(), m.key())
		if e := st.Federation.RegistrationError; e != "" {
			fmt.Fprintf(&b, "\n  the %s is not registered: %s", who, e)
		}
		if e := st.Federation.LastError; e != "" {
			fmt.Fprintf(&b, "\n  the %s does not read the records: %s", who, e)
		}
		for _, p := range st.Peers {
			if p.State == "down" || p.LastError != "" {
				fmt.Fprintf(&b, "\n  the %s says of %s/%s: %s %s", who, p.Datacenter, p.Node, p.State, p.LastError)
			}
		}
	}
	return fmt.Errorf("%w%s", err, b.String())
}

// whatToTry is for another terminal, which enters a server's host first.
func (f *federation) whatToTry(m *machine) {
	enter := "nsenter"
	if inside() == asUser {
		enter += " --user --preserve-credentials"
	}
	f.say(`
It keeps running until Ctrl-C, with alice's sidecar down. Things to try in another terminal, on %[1]s's host:
  %[2]s --net --target %[3]d
  %[4]s status
  %[4]s federation get dc3
  %[4]s federation gateways
  %[4]s explain dc3/carol --probe
  %[5]s members
  less %[6]s`, m.node, enter, m.processes["sidecar"].cmd.Process.Pid, f.o.culvert, f.o.serf, m.processes["sidecar"].log.Name())
}
