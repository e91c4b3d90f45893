package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/test/lab"
)

// The controls: plain serf, without Culvert. What the other tests show means
// something only where these hold.

// plainAgents starts an agent on each host, as it would be without Culvert.
func plainAgents(n *lab.Network) (agents []*lab.SerfAgent, all []string) {
	for i, h := range n.Hosts() {
		agents = append(agents, h.StartSerf(names[i], h.Addr, h.Addr, ""))
		all = append(all, names[i])
	}
	return agents, all
}

func awaitAlive(t *testing.T, agents []*lab.SerfAgent, all []string) {
	t.Helper()
	for _, a := range agents {
		lab.Eventually(t, converge, func() error { return a.Sees("alive", all...) })
	}
}

// Servers on one LAN find each other: serf runs in the lab as it is.
func TestControlOneLAN(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	n := lab.TwoSites(t, lab.Options{HostsA: 2})
	agents, all := plainAgents(n)
	if _, err := agents[0].Do("join", agents[1].Advertise.String()); err != nil {
		t.Fatal(err)
	}
	awaitAlive(t, agents, all)
}

// Between the sites serf has no way of its own, and all that it lacks is one:
// with plain routes, and nothing else changed, all four see all four.
func TestControlRouting(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	for _, ipv6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[ipv6], func(t *testing.T) {
			t.Parallel()
			n := lab.TwoSites(t, lab.Options{HostsA: 2, HostsB: 2, IPv6: ipv6})
			agents, all := plainAgents(n)
			far := net.JoinHostPort(agents[3].Advertise.String(), "7946")
			for _, a := range agents[:2] {
				if out, err := a.Do("join", far); err == nil {
					t.Fatalf("serf join from %s crosses without a route: %s", a.Name, out)
				}
				if err := a.Sees("alive", a.Name); err != nil {
					t.Error(err)
				}
			}
			n.Route()
			for _, a := range agents[:3] {
				if _, err := a.Do("join", far); err != nil {
					t.Fatal(err)
				}
			}
			awaitAlive(t, agents, all)
		})
	}
}

// Forwarding off is what keeps the sites apart: with every route in place, a
// packet crosses while it is on, and none does when it is off.
func TestControlGatewayHostsDoNotForward(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	n := lab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1})
	near, far := n.Sites[0].Hosts[0], n.Sites[1].Hosts[0]
	n.Route()
	sink, err := far.ListenPacket(lab.HostPort(far.Addr, 7946))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sink.Close() }()
	out, err := near.Dial("udp", lab.HostPort(far.Addr, 7946))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	arrives := func() bool {
		t.Helper()
		_, _ = io.WriteString(out, "x")
		_ = sink.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		_, _, err := sink.ReadFromUDPAddrPort(make([]byte, 16))
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err == nil
	}
	lab.Eventually(t, 10*time.Second, func() error {
		if !arrives() {
			return errors.New("the routed network carries nothing")
		}
		return nil
	})
	for _, site := range n.Sites {
		if err := site.Gateway.Do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644)
		}); err != nil {
			t.Fatal(err)
		}
	}
	if arrives() {
		t.Error("with ip_forward off a packet crosses")
	}
}

// The tap sees what begins each connection, each way, and the guard lets no
// other port, and no forwarded packet, pass uncounted.
func TestLabTapAndGuard(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	for _, ipv6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[ipv6], func(t *testing.T) {
			n := lab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1, IPv6: ipv6})
			n.Route()
			a, b := n.Sites[0], n.Sites[1]
			guard, tap := n.Guard(), n.Tap()
			exchange(t, a.Gateway, b.Gateway, b.WAN, "\x16hello", "\x16answer")
			exchange(t, b.Gateway, a.Gateway, a.WAN, "GET", "HTTP")
			lab.Eventually(t, 5*time.Second, func() error {
				seen := make(map[string]int)
				for flow, first := range tap.FirstBytes() {
					seen[fmt.Sprintf("%v>%v %#x", flow.From.Addr(), flow.To.Addr(), first)]++
				}
				for _, want := range []string{"%[1]v>%[2]v 0x16", "%[2]v>%[1]v 0x16", "%[2]v>%[1]v 0x47", "%[1]v>%[2]v 0x48"} {
					if key := fmt.Sprintf(want, a.WAN, b.WAN); seen[key] != 1 || len(seen) != 4 {
						return fmt.Errorf("the tap has seen %v, want %s once", seen, key)
					}
				}
				return nil
			})
			if missed := tap.Missed(); missed != 0 {
				t.Errorf("the tap has missed %d flows", missed)
			}
			passed, dropped := guard.Counts()
			if passed == 0 || dropped != 0 {
				t.Errorf("%d packets passed and %d were dropped, want some and none", passed, dropped)
			}
			c, err := a.Hosts[0].Dial("udp", lab.HostPort(b.Hosts[0].Addr, 8443))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			lab.Eventually(t, 5*time.Second, func() error {
				_, _ = io.WriteString(c, "x")
				if _, dropped := guard.Counts(); dropped == 0 {
					return errors.New("a forwarded packet is not counted")
				}
				return nil
			})
		})
	}
}

// exchange makes one connection, on which each side says something.
func exchange(t *testing.T, from, to *lab.Host, at netip.Addr, there, back string) {
	t.Helper()
	ln, err := to.Listen(lab.HostPort(at, 8443))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	c, err := from.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	for _, say := range []struct {
		from, to net.Conn
		what     string
	}{{c, far, there}, {far, c, back}} {
		_ = say.to.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(say.from, say.what)
		if _, err := io.ReadFull(say.to, make([]byte, len(say.what))); err != nil {
			t.Fatal(err)
		}
	}
}

// victimMode makes this test's own program, run once more, the test that fails
// or is killed.
const victimMode = "CULVERT_TEST_VICTIM"

// Nothing is left of a test that fails, and of a test run that is killed
// neither its processes nor, after the next one's start, its namespaces.
func TestLabLeavesNothing(t *testing.T) {
	lab.Require(t)
	if mode := os.Getenv(victimMode); mode != "" {
		victim(t, mode)
		return
	}
	t.Parallel()
	for _, mode := range []string{"fail", "kill"} {
		t.Run(mode, func(t *testing.T) {
			ready := filepath.Join(t.TempDir(), "ready")
			cmd := again(t, "TestLabLeavesNothing", mode, "CULVERT_TEST_READY="+ready)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var process string
			lab.Eventually(t, 10*time.Second, func() error {
				b, err := os.ReadFile(ready)
				process = strings.TrimSpace(string(b))
				return err
			})
			if mode == "kill" {
				if namespaces(t, cmd.Process.Pid) == 0 {
					t.Error("the victim has no namespaces: this shows nothing")
				}
				_ = cmd.Process.Kill()
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the victim has ended well")
			}
			lab.Eventually(t, 5*time.Second, func() error {
				// That of a zombie is empty.
				if line, err := os.ReadFile("/proc/" + process + "/cmdline"); err == nil && len(line) > 0 {
					return fmt.Errorf("process %s of the victim lives on: %q", process, line)
				}
				return nil
			})
			if mode == "kill" {
				lab.TwoSites(t, lab.Options{})
			}
			// Another test may be sweeping them at this moment.
			lab.Eventually(t, 5*time.Second, func() error {
				if n := namespaces(t, cmd.Process.Pid); n != 0 {
					return fmt.Errorf("%d namespaces of the victim are left", n)
				}
				return nil
			})
		})
	}
}

// again is a run of one test, in this test's own program, as a victim.
func again(t *testing.T, test, mode string, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+test+"$", "-test.count=1", "-test.timeout=60s")
	// What the victim leaves in files goes with this test's own.
	cmd.Env = append(append(os.Environ(), victimMode+"="+mode, "CULVERT_E2E_SUMMARY=", "TMPDIR="+t.TempDir()), env...)
	return cmd
}

// victim makes a network and a process, tells, and fails or waits for its end.
func victim(t *testing.T, mode string) {
	n := lab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1})
	p := n.Sites[0].Hosts[0].Start("sleeper", "sh", "-c", "echo $$; exec sleep 60")
	lab.Eventually(t, 5*time.Second, func() error {
		if !strings.HasSuffix(p.Output(), "\n") {
			return errors.New("the process has not started")
		}
		return nil
	})
	ready := os.Getenv("CULVERT_TEST_READY")
	if err := os.WriteFile(ready+".new", []byte(p.Output()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(ready+".new", ready); err != nil {
		t.Fatal(err)
	}
	if mode == "kill" {
		lab.Wait(60 * time.Second)
	}
	t.Fatal("as it should")
}

// namespaces counts those of a test process.
func namespaces(t *testing.T, pid int) int {
	t.Helper()
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count("\n"+string(out), fmt.Sprintf("\ncvlab-%d-", pid))
}

// A daemon that ends by itself fails its test, also where the test does not
// look; one that is told to end does not.
func TestLabTellsOfDaemonsThatEnd(t *testing.T) {
	lab.Require(t)
	if mode := os.Getenv(victimMode); mode != "" {
		g := lab.TwoSites(t, lab.Options{}).Sites[0].Gateway
		d := g.StartCulvert("gateway", "datacenter = \"dc1\"\nnode = \"gw\"\nlisten { address = \"0.0.0.0:8443\" }\n")
		if mode == "told" {
			d.Kill()
			return
		}
		pids, err := exec.Command("ip", "netns", "pids", g.NS).Output()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := g.Run("sh", "-c", "kill -KILL "+strings.TrimSpace(string(pids))); err != nil {
			t.Fatal(err, out)
		}
		lab.Eventually(t, 5*time.Second, func() error {
			if !d.Ended() {
				return errors.New("still there")
			}
			return nil
		})
		return
	}
	t.Parallel()
	if out, err := again(t, "TestLabTellsOfDaemonsThatEnd", "told").CombinedOutput(); err != nil {
		t.Errorf("a daemon that its test has killed: %v\n%s", err, out)
	}
	const say = "culvert-gateway on dc1gw has ended by itself: signal: killed"
	if out, err := again(t, "TestLabTellsOfDaemonsThatEnd", "crash").CombinedOutput(); err == nil || !strings.Contains(string(out), say) {
		t.Errorf("a daemon that has crashed: %v, want %q:\n%s", err, say, out)
	}
}

// What ends its goroutine inside a namespace, as t.Fatal does, hangs nobody; and
// the test's own process stays outside.
func TestLabDo(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	h := lab.TwoSites(t, lab.Options{}).Sites[0].Gateway
	if err := h.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do returns no error")
	}
	want := errors.New("what f returns")
	var wg sync.WaitGroup
	for range 200 { // of as many threads one would be the main one
		wg.Go(func() {
			if err := h.Do(func() error { return want }); !errors.Is(err, want) {
				t.Errorf("Do returns %v, want %v", err, want)
			}
		})
	}
	wg.Wait()
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	of, err := exec.Command("readlink", "/proc/self/ns/net").Output()
	if err != nil {
		t.Fatal(err)
	}
	if outside := strings.TrimSpace(string(of)); ours != outside {
		t.Errorf("this process is in %s, and what it starts in %s: its main thread has stayed in the lab", ours, outside)
	}
}
