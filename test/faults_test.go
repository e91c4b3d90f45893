package test

import (
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"culvert/test/lab"
)

func addrPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// reconnect makes serf look for failed members every two seconds, not every
// thirty, so that what a test waits for is the path.
const reconnect = `{"reconnect_interval": "2s"}`

// monitor runs serf monitor at debug on an agent's host until the test ends.
func (s *server) monitor() *lab.Process {
	return s.host.Start("monitor-"+s.node, lab.Serf(s.test), "monitor", "-log-level=debug")
}

// failures are the lines in which an agent declared somebody failed.
func failures(p *lab.Process) []string {
	var out []string
	for line := range strings.Lines(p.Output()) {
		if strings.Contains(line, "EventMemberFailed") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

func TestFaults(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	f := newFederation(t, settings{hosts: [2]int{2, 2}, extra: probeService, agentJSON: reconnect})
	var monitors []*lab.Process
	for _, s := range f.servers {
		monitors = append(monitors, s.monitor())
	}
	f.join()
	alice, bob := f.servers[0], f.servers[2]
	flows := []*flow{startFlow(t, alice, bob), startFlow(t, bob, alice)}
	for _, fl := range flows {
		fl.await(time.Now(), 10*time.Second)
	}

	restarts(t, f, flows, monitors)
	for _, fault := range []struct {
		name       string
		begin, end func()
	}{{"link down", f.Cut, f.Mend}, {"silence", f.Swallow, f.Return}} {
		fault.begin()
		lab.Wait(5 * time.Second)
		fault.end()
		back := time.Now()
		for _, fl := range flows {
			took := fl.await(back, 30*time.Second)
			t.Logf("%s for 5 s: first packet from %s to %s %v after the return", fault.name, fl.from.node, fl.to.node, took.Round(time.Millisecond))
			if took > 1500*time.Millisecond {
				t.Errorf("%s: first packet from %s to %s after %v, want at most 1.5 s", fault.name, fl.from.node, fl.to.node, took)
			}
		}
		f.allAlive()
	}

	// An agent that is killed is failed at the others, and alive again after
	// its restart.
	bob.agent.Kill()
	for _, s := range f.servers {
		if s != bob {
			lab.Eventually(t, 60*time.Second, func() error { return s.agent.Sees("failed", bob.node) })
		}
	}
	bob.agent.Again()
	bob.agent.AwaitUp()
	if _, err := bob.agent.Do("join", alice.advertise.String()); err != nil {
		t.Error(err)
	}
	f.allAlive()
	for _, fl := range flows {
		sources := fl.seenFrom()
		if want := fl.from.advertise.String(); len(sources) != 1 || sources[want] == 0 {
			t.Errorf("packets from %s came from %v, want %s alone", fl.from.node, sources, want)
		}
	}
}

// restarts restarts a sidecar and both gateways, five times each way, under
// gossip: nobody may be declared failed.
func restarts(t *testing.T, f *federation, flows []*flow, monitors []*lab.Process) {
	t.Helper()
	f.restartUnder(flows, monitors, "sidecar of alice", f.servers[0].sidecar)
	f.restartUnder(flows, monitors, "gateway of dc1", f.gateways[0])
	f.restartUnder(flows, monitors, "gateway of dc2", f.gateways[1])
}

// restartUnder restarts one daemon under gossip.
func (f *federation) restartUnder(flows []*flow, monitors []*lab.Process, name string, d *lab.Daemon) {
	f.t.Helper()
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		began := time.Now()
		for range 5 {
			if sig == syscall.SIGTERM {
				d.Stop()
			} else {
				d.Kill()
			}
			d.Again()
			d.AwaitReady()
			for _, fl := range flows {
				fl.await(time.Now(), 20*time.Second)
			}
		}
		f.t.Logf("%s, 5 times %v: longest gaps %v and %v", name, sig,
			flows[0].longestGap(began).Round(time.Millisecond), flows[1].longestGap(began).Round(time.Millisecond))
	}
	for i, m := range monitors {
		if out := failures(m); len(out) > 0 {
			f.t.Errorf("%s declared failed while the %s was restarted: %s", f.servers[i].node, name, strings.Join(out, "\n"))
		}
		if !strings.Contains(m.Output(), "[DEBUG]") {
			f.t.Errorf("the monitor of %s saw nothing", f.servers[i].node)
		}
	}
}

// After half a minute of silence on the WAN link everybody is alive again at
// most two seconds later than on a plainly routed network in the same trouble
// at the same time.
func TestSilenceAgainstPlainRouting(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	captured := newFederation(t, settings{hosts: [2]int{2, 2}, agentJSON: reconnect})
	plain := newFederation(t, settings{hosts: [2]int{2, 2}, agentJSON: reconnect, noSidecars: true, noAgents: true})
	plain.Route()
	for _, s := range plain.servers {
		s.advertise = s.host.Addr
		s.agent = s.host.StartSerf(s.node, s.host.Addr, s.advertise, reconnect)
	}
	both := []*federation{captured, plain}
	for _, f := range both {
		f.join()
		f.Swallow()
	}
	lab.Wait(30 * time.Second)
	for i, f := range both {
		if f.servers[0].agent.Sees("alive", f.nodes()...) == nil {
			t.Errorf("network %d: 30 s of silence, and nobody has failed: this compares nothing", i)
		}
	}
	back := time.Now()
	for _, f := range both {
		f.Return()
	}
	var took [2]time.Duration
	var wg sync.WaitGroup
	for i, f := range both {
		wg.Go(func() { took[i] = f.recovery(back) })
	}
	wg.Wait()
	t.Logf("30 s of silence: all alive again after %v through sidecars, after %v plainly routed",
		took[0].Round(time.Millisecond), took[1].Round(time.Millisecond))
	if took[0] > took[1]+2*time.Second {
		t.Errorf("through sidecars %v, plainly routed %v: want at most 2 s more", took[0], took[1])
	}
}

// recovery is when all were alive again in everybody's eyes.
func (f *federation) recovery(since time.Time) time.Duration {
	limit := time.After(90 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var err error
		for _, s := range f.servers {
			if err = s.agent.Sees("alive", f.nodes()...); err != nil {
				break
			}
		}
		if err == nil {
			return time.Since(since)
		}
		select {
		case <-tick.C:
		case <-limit:
			f.t.Errorf("not recovered after 90 s: %v", err)
			return time.Since(since)
		}
	}
}
