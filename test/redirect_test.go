package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/test/lab"
)

// Untouched means untouched: servers that listen on all addresses, with the
// command line of a plainly routed network, federate all the same, and nothing
// of theirs leaves but as TLS.
func TestRedirectIPv4(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	testRedirect(t, false)
}

func TestRedirectIPv6(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	testRedirect(t, true)
}

func testRedirect(t *testing.T, ipv6 bool) {
	plain := newFederation(t, settings{hosts: [2]int{2, 2}, ipv6: ipv6, redirect: true, noSidecars: true})
	plain.Route()
	plain.join()
	f := newFederation(t, settings{hosts: [2]int{2, 2}, ipv6: ipv6, redirect: true, watched: true, extra: probeService + streamService})
	for i, s := range f.servers {
		if ours, theirs := s.agent.CommandLine(), plain.servers[i].agent.CommandLine(); ours != theirs || !strings.Contains(ours, "serf agent") {
			t.Errorf("the agent of %s runs as\n%s\nand that of the plain network as\n%s", s.node, ours, theirs)
		}
	}
	f.join()
	f.reachEachOther()
	alice, bob := f.servers[0], f.servers[2]
	f.largeDatagrams(alice, bob)
	f.sourcesOfStreams(alice, bob)
	passed, dropped := f.guard.Counts()
	if passed == 0 || dropped != 0 {
		t.Errorf("on the WAN link %d packets passed and %d were dropped, want some and none", passed, dropped)
	}
	f.tap.Check(t, 0x16)
	if n := f.SentPlainly(); n != 0 {
		t.Errorf("%d packets for the other site left plainly", n)
	}
	t.Logf("%v: %d packets crossed the WAN link", f.Network, passed)
}

// largeDatagrams sends one of 8 KiB each way, which arrives whole and from its
// sender's real address.
func (f *federation) largeDatagrams(a, b *server) {
	f.t.Helper()
	payload := strings.Repeat("0123456789abcdef", 512)
	for _, way := range [][2]*server{{a, b}, {b, a}} {
		from, to := way[0], way[1]
		in, err := to.host.ListenPacket(lab.HostPort(to.host.Addr, probePort))
		if err != nil {
			f.t.Fatal(err)
		}
		out, err := from.host.ListenPacket(lab.HostPort(from.host.Addr, probePort))
		if err != nil {
			f.t.Fatal(err)
		}
		if _, err := out.WriteToUDPAddrPort([]byte(payload), addrPort(to.advertise, probePort)); err != nil {
			f.t.Fatal(err)
		}
		_ = in.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 65536)
		n, src, err := in.ReadFromUDPAddrPort(buf)
		if want := addrPort(from.advertise, probePort); err != nil || string(buf[:n]) != payload || src != want {
			f.t.Errorf("%s received %d bytes from %v, %v; want %d from %v", to.node, n, src, err, len(payload), want)
		}
		_, _ = in.Close(), out.Close()
	}
}

// streamPort is a stream service of the tests' own, beside serf's.
const streamPort = 7998

const streamService = `service "talk" {
  kind = "stream"
  port = 7998
}
`

// sourcesOfStreams checks that a server sees the streams of one peer come from
// one address, which the status tells, and no two peers' from the same.
func (f *federation) sourcesOfStreams(from, to *server) {
	f.t.Helper()
	ln, err := to.host.Listen(lab.HostPort(to.host.Addr, streamPort))
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	endpoints := make(map[string]string)
	for _, p := range to.sidecar.Status().Peers {
		if p.Datacenter == to.dc {
			continue
		}
		if other, twice := endpoints[p.Endpoint]; twice || p.Endpoint == "" {
			f.t.Errorf("%s and %s have endpoint %q at %s", p.Node, other, p.Endpoint, to.node)
		}
		endpoints[p.Endpoint] = p.Node
	}
	for range 3 {
		c, err := from.host.Dial("tcp", addrPort(to.advertise, streamPort).String())
		if err != nil {
			f.t.Fatal(err)
		}
		_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(5 * time.Second))
		far, err := ln.Accept()
		if err != nil {
			f.t.Fatal(err)
		}
		host, _, err := net.SplitHostPort(far.RemoteAddr().String())
		if err != nil || endpoints[host] != from.node {
			f.t.Errorf("a stream of %s's came to %s from %s, want its endpoint of %v", from.node, to.node, host, endpoints)
		}
		_, _ = c.Close(), far.Close()
	}
}

// firewall is what many hosts have: a filter on the state of connections, which
// takes what is on the loopback interface, and masquerading for containers.
const firewall = `table inet filter {
  chain input {
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    ct state invalid drop
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport { 8443, 7946 } accept
    udp dport 7946 accept
  }
  chain output {
    type filter hook output priority 0; policy accept;
    ct state invalid drop
  }
}
table ip nat {
  chain post { type nat hook postrouting priority 100; oifname "eth0" masquerade; }
}
`

// Servers that have gossiped for a minute beside others' rules are captured at
// once, restarts of a sidecar let nothing out and nobody fail, and nobody else's
// rules change.
func TestRedirectUnderGossip(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := settings{hosts: [2]int{2, 2}, redirect: true, extra: probeService}
	idle := s
	idle.noSidecars = true
	f := newFederation(t, idle)
	for _, one := range f.servers {
		one.host.NFT(firewall)
	}
	last := f.servers[3].advertise.String()
	for _, one := range f.servers[:3] {
		_, _ = one.agent.Do("join", last) // in vain from the other site, and each try is a tracked connection
	}
	var monitors []*lab.Process
	for _, one := range f.servers {
		monitors = append(monitors, one.monitor())
	}
	lab.Wait(60 * time.Second)
	before := make(map[string]string)
	for _, one := range f.servers {
		before[one.node] = one.host.Ruleset("culvert_")
		if !strings.Contains(before[one.node], "masquerade") {
			t.Fatalf("the rules of %s are\n%s", one.node, before[one.node])
		}
	}
	same := func(when string) {
		t.Helper()
		for _, one := range f.servers {
			if now := one.host.Ruleset("culvert_"); now != before[one.node] {
				t.Errorf("%s the rules of others on %s are\n%s\nand were\n%s", when, one.node, now, before[one.node])
			}
		}
	}
	old := make(map[string]bool)
	for _, one := range f.servers {
		for _, entry := range f.tracked(one) {
			old[entry] = true
		}
	}
	f.startCulvert(s)
	plainly := f.SentPlainly()
	if plainly == 0 {
		t.Error("nothing was sent plainly before the sidecars were there: the counter is broken")
	}
	began := time.Now()
	flows := []*flow{startFlow(t, f.servers[0], f.servers[2]), startFlow(t, f.servers[2], f.servers[0])}
	for _, fl := range flows {
		fl.await(began, 5*time.Second)
	}
	f.join()
	t.Logf("all four alive in everybody's eyes %v after the sidecars were ready", time.Since(began).Round(time.Millisecond))
	same("while sidecars run")
	f.restartUnder(flows, monitors, "sidecar of alice", f.servers[0].sidecar)
	same("after restarts")
	if now := f.SentPlainly(); now != plainly {
		t.Errorf("%d packets for the other site left plainly after the sidecars were there", now-plainly)
	}
	for _, one := range f.servers {
		for _, entry := range f.tracked(one) {
			if !old[entry] {
				t.Errorf("%s tracks captured traffic: %s", one.node, entry)
			}
		}
		one.sidecar.Stop()
	}
	same("after the sidecars' end")
}

// tracked are the entries of the host's connection tracking about a service port
// and a peer of the other site, or an endpoint: their addresses and ports.
func (f *federation) tracked(s *server) []string {
	f.t.Helper()
	out, err := s.host.Run("cat", "/proc/net/nf_conntrack")
	if err != nil {
		f.t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(out) {
		ours := strings.Contains(line, "=127.200.")
		for _, peer := range f.servers {
			ours = ours || peer.dc != s.dc && strings.Contains(line, "="+peer.advertise.String()+" ")
		}
		if !ours || !strings.Contains(line, "port=7946 ") && !strings.Contains(line, "port=17946 ") {
			continue
		}
		found = append(found, strings.Join(slices.DeleteFunc(strings.Fields(line), func(field string) bool {
			key, _, _ := strings.Cut(field, "=")
			return !slices.Contains([]string{"src", "dst", "sport", "dport"}, key)
		}), " "))
	}
	return found
}

// refusals says whether this host refuses a packet and a connection to a server,
// as it does at once or not at all.
func refusals(from *server, to netip.Addr) (packet, stream bool, err error) {
	refused := func(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPERM) }
	c, err := from.host.Dial("udp", addrPort(to, 7946).String())
	if err != nil {
		return false, false, err
	}
	defer func() { _ = c.Close() }()
	_, err = c.Write([]byte("x"))
	if err == nil {
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		_, err = c.Read(make([]byte, 1))
	}
	tcp, dialled := from.host.Dial("tcp", addrPort(to, 7946).String())
	if dialled == nil {
		_ = tcp.Close()
	}
	return refused(err), refused(dialled), errors.Join(err, dialled)
}

// wantRefused checks that what is for a server is refused at once and does not
// leave.
func (f *federation) wantRefused(when string, from *server, to netip.Addr) {
	f.t.Helper()
	before := f.SentPlainly()
	if packet, stream, err := refusals(from, to); !packet || !stream {
		f.t.Errorf("%s a packet and a connection to %v end with %v, want both refused", when, to, err)
	}
	if now := f.SentPlainly(); now != before {
		f.t.Errorf("%s %d packets left plainly", when, now-before)
	}
}

// wantPlain checks that what is for a server leaves as it would without Culvert.
func (f *federation) wantPlain(when string, from *server, to netip.Addr) {
	f.t.Helper()
	before := f.SentPlainly()
	if packet, stream, err := refusals(from, to); packet || stream {
		f.t.Errorf("%s a packet and a connection to %v end with %v, want none refused", when, to, err)
	}
	if f.SentPlainly() == before {
		f.t.Errorf("%s nothing left plainly", when)
	}
}

// clear runs culvert capture clear on a server's host.
func (s *server) clear(args ...string) (string, error) {
	return s.host.Run(lab.Culvert(s.test), append([]string{"capture", "clear"}, args...)...)
}

// Who stops, and who crashes, lets nothing out, unless the operator said so.
func TestRedirectExit(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	for _, ipv6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[ipv6], func(t *testing.T) {
			t.Parallel()
			s := settings{hosts: [2]int{1, 1}, ipv6: ipv6, redirect: true, noAgents: true}
			f := newFederation(t, s)
			alice, bob := f.servers[0], f.servers[1].advertise
			if out, err := alice.clear(); err == nil || !strings.Contains(err.Error(), "a running sidecar holds this table") {
				t.Errorf("clear while the sidecar runs: %q, %v", out, err)
			}
			alice.sidecar.Kill()
			f.wantRefused("after a crash", alice, bob)
			alice.sidecar.Again()
			alice.sidecar.AwaitReady()
			alice.sidecar.Stop()
			f.wantRefused("after a stop", alice, bob)
			show, err := alice.host.Run(lab.Culvert(t), "capture", "show")
			if err != nil || !strings.Contains(show, "no sidecar runs") || !strings.Contains(show, bob.String()) {
				t.Errorf("capture show: %q, %v", show, err)
			}
			if out, err := alice.clear(); err != nil || !strings.Contains(out, "culvert_8443 is gone") {
				t.Errorf("clear: %q, %v", out, err)
			}
			f.wantPlain("after clear", alice, bob)

			open := strings.Replace(f.sidecarConfig(alice, s), `capture = "redirect"`, "capture = \"redirect\"\non_exit = \"open\"", 1)
			again := alice.host.StartCulvert("sidecar", open)
			again.Kill()
			f.wantRefused("after a crash with on_exit open", alice, bob)
			again.Again()
			again.AwaitReady()
			again.Stop()
			f.wantPlain("after a stop with on_exit open", alice, bob)
			if show, err := alice.host.Run(lab.Culvert(t), "capture", "show"); err != nil || !strings.Contains(show, "no rules of culvert") {
				t.Errorf("capture show after that: %q, %v", show, err)
			}
		})
	}
}

// Peers move, come and go under traffic of others, who lose nothing. Who has gone
// is refused until the operator lets it go.
func TestRedirectPeersComeAndGo(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := settings{hosts: [2]int{1, 2}, redirect: true, noAgents: true, extra: probeService}
	f := newFederation(t, s)
	alice, amy, bob := f.servers[0], f.servers[1], f.servers[2]
	flows := []*flow{startFlow(t, alice, bob), startFlow(t, bob, alice)}
	for _, fl := range flows {
		fl.await(time.Now(), 10*time.Second)
	}
	base := f.sidecarConfig(alice, s)
	reload := func(config string) {
		t.Helper()
		alice.host.WriteFile("sidecar.hcl", config)
		loaded := alice.sidecar.Metrics().Sum("culvert_certs_reloads_total", "result", "ok")
		alice.sidecar.Signal(syscall.SIGHUP)
		lab.Eventually(t, 5*time.Second, func() error {
			if alice.sidecar.Metrics().Sum("culvert_certs_reloads_total", "result", "ok") == loaded {
				return errors.New("not reloaded")
			}
			return nil
		})
	}
	moved, another := netip.MustParseAddr("10.72.0.77"), netip.MustParseAddr("10.72.0.78")
	reload(strings.ReplaceAll(base, amy.advertise.String(), moved.String()))
	f.wantRefused("after amy has moved, at his old address", alice, amy.advertise)
	one := *amy
	one.advertise = moved
	startFlow(t, alice, &one).await(time.Now(), 5*time.Second)
	reload(base + fmt.Sprintf("peer \"carol\" {\n  datacenter = \"dc2\"\n  advertise = %q\n}\n", another))
	f.wantRefused("after amy has moved back, at the address between", alice, moved)
	before, block, _ := strings.Cut(base, fmt.Sprintf("peer %q", amy.node))
	_, after, _ := strings.Cut(block, "}\n")
	reload(before + after)
	for _, gone := range []netip.Addr{amy.advertise, moved, another} {
		f.wantRefused("after all but bob have gone", alice, gone)
	}
	if out, err := alice.clear(another.String()); err != nil || !strings.Contains(out, "not refused any more") {
		t.Errorf("clear of an address: %q, %v", out, err)
	}
	f.wantPlain("after its clear", alice, another)
	if out, err := alice.clear(bob.advertise.String()); err == nil || !strings.Contains(err.Error(), "not refused for a peer that has left") {
		t.Errorf("clear of a peer's address: %q, %v", out, err)
	}
	lab.Eventually(t, 5*time.Second, func() error {
		if lost := alice.sidecar.Status().Capture.Lost; len(lost) != 2 {
			return fmt.Errorf("the sidecar still refuses %v", lost)
		}
		return nil
	})
	for _, fl := range flows {
		fl.wantWhole()
	}
}

// Two sidecars on a host, of two domains and two kinds of server, leave each
// other's rules alone.
func TestRedirectTwoSidecars(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := settings{hosts: [2]int{1, 1}, redirect: true, noAgents: true, extra: probeService}
	f := newFederation(t, s)
	alice := f.servers[0]
	flows := []*flow{startFlow(t, alice, f.servers[1]), startFlow(t, f.servers[1], alice)}
	for _, fl := range flows {
		fl.await(time.Now(), 10*time.Second)
	}
	table := func() string {
		t.Helper()
		out, err := alice.host.Run("nft", "list", "table", "ip", "culvert_8443")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	before := table()
	nomad := lab.NewPKI(t, "nomad")
	config := fmt.Sprintf(`datacenter = "dc1"
node    = "alice"
server {
  profile = "nomad"
  address = %q
}
capture = "redirect"
on_exit = "open"
listen { address = %q }
gateways = [%q]
peer "bob" {
  datacenter = "dc2"
  advertise  = %q
}
admin { address = "127.0.0.1:7441" }
%s`, alice.host.Addr, lab.HostPort(alice.host.Addr, 8445), lab.HostPort(f.Sites[0].Gateway.Addr, 8443), f.servers[1].advertise, nomad.Server("dc1", "alice", "nomad"))
	second := alice.host.StartAnother("sidecar", "nomad", config, "127.0.0.1:7441")
	if now := table(); now != before {
		t.Errorf("beside a second sidecar the first one's table is\n%s\nand was\n%s", now, before)
	}
	show, err := alice.host.Run(lab.Culvert(t), "capture", "show")
	if err != nil || !strings.Contains(show, "culvert_8443") || !strings.Contains(show, "culvert_8445") {
		t.Errorf("capture show: %q, %v", show, err)
	}
	if out, err := alice.clear(); err == nil || !strings.Contains(err.Error(), "there are several tables: culvert_8443, culvert_8445") {
		t.Errorf("clear without a table: %q, %v", out, err)
	}
	second.Stop()
	if now := table(); now != before {
		t.Errorf("after the second sidecar's end the first one's table is\n%s\nand was\n%s", now, before)
	}
	for _, fl := range flows {
		fl.wantWhole()
	}
}

// A host's own firewall that drops what is not tracked is told from a peer that
// is dead, with what to do.
func TestRedirectBesideAFirewall(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	f := newFederation(t, settings{hosts: [2]int{1, 1}, redirect: true, noAgents: true})
	alice := f.servers[0]
	strict := strings.Replace(firewall, "    iif lo accept\n", "    tcp dport 7440 iif lo accept\n", 1)
	alice.host.NFT(strict)
	lab.Eventually(t, 20*time.Second, func() error {
		code, body, err := alice.sidecar.Get("/readyz")
		if err != nil || code != 503 || !strings.Contains(string(body), "on the loopback interface") {
			return fmt.Errorf("readyz: %d %s, %v", code, body, err)
		}
		return nil
	})
	if out := alice.sidecar.Output(); !strings.Contains(out, "the host's own firewall keeps the server from its peers' endpoints") || !strings.Contains(out, "iif lo accept") {
		t.Errorf("the log does not tell what is wrong and what to do:\n%s", out)
	}
	if m := alice.sidecar.Metrics(); m.Sum("culvert_capture_blocked") != 1 {
		t.Error("the metric does not tell")
	}
	alice.host.NFT("insert rule inet filter input iif lo accept")
	alice.sidecar.AwaitReady()

	// Rules that somebody flushes come back.
	alice.host.NFT("flush ruleset")
	lab.Eventually(t, 5*time.Second, func() error {
		if n := alice.sidecar.Metrics().Sum("culvert_capture_repairs_total"); n != 1 {
			return fmt.Errorf("%v repairs", n)
		}
		return nil
	})
	f.wantCarried(alice, f.servers[1])

	// Nobody reaches an endpoint from outside: who could would speak in alice's name.
	gw := f.Sites[0].Gateway
	for _, port := range []int{17946} {
		if c, err := gw.Dial("tcp", lab.HostPort(alice.host.Addr, port)); err == nil {
			_ = c.Close()
			t.Errorf("port %d of the endpoints is open to other hosts", port)
		}
	}
}

// wantCarried checks that a connection reaches the other server.
func (f *federation) wantCarried(from, to *server) {
	f.t.Helper()
	ln, err := to.host.Listen(lab.HostPort(to.host.Addr, 7946))
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	go func() {
		if c, err := ln.Accept(); err == nil {
			_, _ = io.WriteString(c, to.node)
			_ = c.Close()
		}
	}()
	c, err := from.host.Dial("tcp", addrPort(to.advertise, 7946).String())
	if err != nil {
		f.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if got, err := io.ReadAll(c); err != nil || string(got) != to.node {
		f.t.Errorf("%s answers %q, %v", to.node, got, err)
	}
}
