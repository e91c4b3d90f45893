package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"culvert/certs"
	"culvert/config"
	"culvert/internal/testnetns"
	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(testnetns.Main(m)) }

// Two whole sidecars on the loopback interface, each with sockets of the test
// for a server. They reach each other directly.

const port = 17946

// ranges gives each test a 127.N.0.0/16 of its own.
var ranges atomic.Uint32

type side struct {
	*Sidecar
	cfg      *config.Sidecar
	registry *prometheus.Registry
	udp      *net.UDPConn
	tcp      *net.TCPListener
	stop     func()
}

type pair struct {
	alice, bob *side
	ca         *testpki.CA
	n          byte
}

func (p *pair) addr(site, host byte) netip.Addr {
	return netip.AddrFrom4([4]byte{127, p.n, site, host})
}

// newPair starts alice in dc1 and bob in dc2.
func newPair(t testing.TB) *pair {
	t.Helper()
	p := &pair{ca: testpki.New(t, "consul"), n: byte(150 + ranges.Add(1))}
	p.alice = p.start(t, p.config(t, 1, "alice"))
	p.bob = p.start(t, p.config(t, 2, "bob"))
	return p
}

// newMixedPair starts the same two, and captures alice's server by redirect: it
// has a real address, and knows bob's by one that leads nowhere.
func newMixedPair(t testing.TB) *pair {
	t.Helper()
	testnetns.Require(t)
	p := &pair{ca: testpki.New(t, "consul"), n: byte(150 + ranges.Add(1))}
	cfg := p.config(t, 1, "alice")
	cfg.Capture, cfg.OnExit = config.CaptureRedirect, config.OnExitOpen
	cfg.Server.Address = netip.MustParseAddr("10.1.0.1")
	for i := range cfg.Services {
		cfg.Services[i].Local = netip.AddrPortFrom(cfg.Server.Address, port)
	}
	cfg.Peers[0].Advertise = netip.MustParseAddr("10.2.0.1")
	p.alice = p.start(t, cfg)
	p.bob = p.start(t, p.config(t, 2, "bob"))
	return p
}

func (p *pair) config(t testing.TB, site byte, node string) *config.Sidecar {
	t.Helper()
	dc, other, otherNode := fmt.Sprintf("dc%d", site), 3-site, map[string]string{"alice": "bob", "bob": "alice"}[node]
	ca, cert, key := p.ca.WriteFiles(t, t.TempDir(), p.ca.Leaf(t, testpki.Server(dc, node)))
	server := p.addr(site, 100)
	local := netip.AddrPortFrom(server, port)
	return &config.Sidecar{
		Datacenter: dc, Node: node, Domain: "consul",
		Server: config.Server{Address: server, Advertise: p.addr(site, 1)},
		Services: []config.Service{
			{Name: "gossip-packet", Kind: "packet", Port: port, Local: local, ALPN: "consul/wan-gossip/packet"},
			{Name: "gossip-stream", Kind: "stream", Port: port, Local: local},
		},
		Capture: "bind", Listen: config.Listen{Address: p.addr(site, 200).String() + ":8443"},
		TLS: config.TLS{CAFile: ca, CertFile: cert, KeyFile: key},
		Peers: []config.Peer{{
			Datacenter: fmt.Sprintf("dc%d", other), Node: otherNode, Advertise: p.addr(other, 1), Address: p.addr(other, 200).String() + ":8443",
		}},
		Datacenters: []config.Datacenter{{Name: fmt.Sprintf("dc%d", other), Mode: "direct"}},
		Admin:       config.Admin{Address: "127.0.0.1:0"},
	}
}

func (p *pair) start(t testing.TB, cfg *config.Sidecar) *side {
	t.Helper()
	local := cfg.Services[0].Local
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(local))
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(local))
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	s, err := New(cfg, Options{Registry: registry, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	out := &side{Sidecar: s, cfg: cfg, registry: registry, udp: udp, tcp: tcp}
	out.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(15 * time.Second):
			t.Error("Run did not return within 15 s")
		}
		_ = udp.Close()
		_ = tcp.Close()
	}
	t.Cleanup(out.stop)
	return out
}

func (s *side) send(t testing.TB, to netip.Addr, payload string) {
	t.Helper()
	if _, err := s.udp.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(to, port)); err != nil {
		t.Fatal(err)
	}
}

func (s *side) receive(t testing.TB) (string, netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 65536)
	_ = s.udp.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, from, err := s.udp.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n]), from
}

func eventually(t testing.TB, f func() error) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if f() == nil {
			return
		}
		<-tick.C
	}
	t.Fatal(f())
}

func TestPacketsAndStreamsCross(t *testing.T) {
	p := newPair(t)
	p.alice.send(t, p.addr(2, 1), "ping")
	if got, from := p.bob.receive(t); got != "ping" || from != netip.AddrPortFrom(p.addr(1, 1), port) {
		t.Errorf("bob's server got %q from %v, want it from alice's advertised address", got, from)
	}
	big := strings.Repeat("x", 60000)
	p.bob.send(t, p.addr(1, 1), big)
	if got, _ := p.alice.receive(t); got != big {
		t.Errorf("alice's server got %d bytes, want %d", len(got), len(big))
	}

	near, err := net.Dial("tcp4", netip.AddrPortFrom(p.addr(2, 1), port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = near.Close() }()
	_ = p.bob.tcp.SetDeadline(time.Now().Add(10 * time.Second))
	far, err := p.bob.tcp.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	if host := far.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); host != p.addr(1, 1) {
		t.Errorf("bob's server is dialled from %v, want alice's advertised address", host)
	}
	_, _ = io.WriteString(near, "question")
	_ = near.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(far); err != nil || string(got) != "question" {
		t.Errorf("read %q, %v", got, err)
	}
	_, _ = io.WriteString(far, "answer")
	_ = far.Close()
	if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
		t.Errorf("read %q, %v", got, err)
	}

	eventually(t, func() error {
		st := p.alice.Status()
		got := st.Peers[0]
		want := PeerStatus{
			Datacenter: "dc2", Node: "bob", Advertise: p.addr(2, 1).String(), Path: "direct", State: "up",
			PacketsSent: 1, PacketsReceived: 1, BytesSent: 4 + 8, BytesReceived: 60000 + 6, StreamsTotal: 1, Sessions: 1,
			Authenticated: "bob.server.dc2.consul", TLS: "TLS 1.3",
		}
		if len(got.Drops) != 0 || !st.Ready {
			return fmt.Errorf("status %+v", st)
		}
		got.Drops = nil
		if strings.Contains(got.LastError, "refused") {
			got.LastError = "" // alice was connecting already when bob did not listen yet
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			return fmt.Errorf("status\n%+v, want\n%+v", got, want)
		}
		return nil
	})
}

// With redirect a sidecar does the same for a server with a real address, and
// tells where each peer's streams come from.
func TestRedirectCrosses(t *testing.T) {
	p := newMixedPair(t)
	bob := p.alice.cfg.Peers[0].Advertise
	p.alice.send(t, bob, "ping")
	if got, from := p.bob.receive(t); got != "ping" || from != netip.AddrPortFrom(p.addr(1, 1), port) {
		t.Errorf("bob's server got %q from %v, want it from alice's advertised address", got, from)
	}
	p.bob.send(t, p.addr(1, 1), "pong")
	if got, from := p.alice.receive(t); got != "pong" || from != netip.AddrPortFrom(bob, port) {
		t.Errorf("alice's server got %q from %v, want it from %v", got, from, bob)
	}
	eventually(t, func() error {
		st := p.alice.Status()
		if !st.Ready || st.Capture.Mode != "redirect" || st.Capture.Table != "culvert_8443" || len(st.Capture.Lost) != 0 || st.Peers[0].Endpoint == "" {
			return fmt.Errorf("status %+v", st)
		}
		return nil
	})
	next := *p.alice.cfg
	next.Peers = []config.Peer{{Datacenter: "dc1", Node: "amy", Advertise: netip.MustParseAddr("10.1.0.9")}}
	if err := p.alice.Reload(&next); err != nil {
		t.Fatal(err)
	}
	if st := p.alice.Status(); len(st.Peers) != 1 || st.Peers[0].Path != "plain" || st.Peers[0].Endpoint != "" {
		t.Errorf("after bob has left and amy come, a sibling: %+v", st)
	}
}

// A reload brings a peer and takes another without touching the rest; one that
// cannot be had changes nothing.
func TestReload(t *testing.T) {
	p := newPair(t)
	p.alice.send(t, p.addr(2, 1), "before")
	p.bob.receive(t)
	eventually(t, func() error {
		if n := p.alice.Status().Peers[0].PacketsSent; n != 1 {
			return fmt.Errorf("%d packets counted as sent, want 1", n)
		}
		return nil
	})

	carol := config.Peer{Datacenter: "dc2", Node: "carol", Advertise: p.addr(2, 2), Address: "127.0.0.1:1"}
	next := *p.alice.cfg
	next.Peers = append([]config.Peer{carol}, p.alice.cfg.Peers...)
	if err := p.alice.Reload(&next); err != nil {
		t.Fatal(err)
	}
	if st := p.alice.Status(); len(st.Peers) != 2 || st.Peers[0].PacketsSent != 1 {
		t.Errorf("after the reload: %+v", st.Peers)
	}
	p.alice.send(t, p.addr(2, 1), "after")
	if got, _ := p.bob.receive(t); got != "after" {
		t.Errorf("bob's server got %q", got)
	}

	// An address that another process has.
	taken, err := net.ListenUDP("udp4", &net.UDPAddr{IP: p.addr(2, 3).AsSlice(), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	bad := next
	bad.Peers = []config.Peer{{Datacenter: "dc2", Node: "dave", Advertise: p.addr(2, 3), Address: "127.0.0.1:1"}}
	if err := p.alice.Reload(&bad); err == nil || !strings.Contains(err.Error(), "dc2/dave") {
		t.Errorf("a peer whose address is taken: %v", err)
	}
	moved := next
	moved.Listen.Address = "127.0.0.1:9"
	if err := p.alice.Reload(&moved); err == nil || !strings.Contains(err.Error(), "a reload cannot change listen") {
		t.Errorf("another listen address: %v", err)
	}
	if err := os.WriteFile(next.TLS.CertFile, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	without := next
	without.Peers = p.alice.cfg.Peers
	socket := inode(t, netip.AddrPortFrom(p.addr(2, 2), port))
	if err := p.alice.Reload(&without); err == nil || !strings.Contains(err.Error(), "reload certificates") {
		t.Errorf("a certificate that cannot be read: %v", err)
	}
	if now := inode(t, netip.AddrPortFrom(p.addr(2, 2), port)); now != socket || socket == "" {
		t.Errorf("the refused reload touched an endpoint: socket %q before, %q after", socket, now)
	}
	if st := p.alice.Status(); len(st.Peers) != 2 {
		t.Errorf("after reloads that were refused: %+v", st.Peers)
	}
	p.alice.send(t, p.addr(2, 1), "still")
	if got, _ := p.bob.receive(t); got != "still" {
		t.Errorf("bob's server got %q", got)
	}
}

// inode is the kernel's number of the UDP socket that has an address, "" where
// there is none.
func inode(t *testing.T, at netip.AddrPort) string {
	t.Helper()
	table, err := os.ReadFile("/proc/net/udp")
	if err != nil {
		t.Fatal(err)
	}
	a := at.Addr().As4()
	local := fmt.Sprintf("%02X%02X%02X%02X:%04X", a[3], a[2], a[1], a[0], at.Port())
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 9 && f[1] == local {
			return f[9]
		}
	}
	return ""
}

// A certificate of our own names, in other hands, has no address here.
func TestOwnIdentityIsNoPeer(t *testing.T) {
	p := newPair(t)
	self := certs.Identity{Datacenter: "dc1", Node: "alice", Role: certs.RoleServer}
	if _, err := p.alice.deliver(self, "gossip-packet", [][]byte{[]byte("x")}); err == nil {
		t.Error("a packet from ourselves was delivered")
	}
}

func TestReadiness(t *testing.T) {
	p := newPair(t)
	eventually(t, func() error {
		if r := p.alice.readiness(); !r.Ready {
			return fmt.Errorf("not ready: %+v", r.Checks)
		}
		return nil
	})
	p.alice.stop()
	if r := p.alice.readiness(); r.Ready || r.Checks[0].Detail != "stopping" {
		t.Errorf("after the stop: %+v", r)
	}
}

// While a sidecar that stops waits for a stream, packets go on both ways.
func TestPacketsGoOnThroughADrain(t *testing.T) {
	p := newPair(t)
	near, err := net.Dial("tcp4", netip.AddrPortFrom(p.addr(2, 1), port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = near.Close() }()
	_ = p.bob.tcp.SetDeadline(time.Now().Add(10 * time.Second))
	far, err := p.bob.tcp.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	both := func(when string) {
		p.alice.send(t, p.addr(2, 1), when)
		if got, _ := p.bob.receive(t); got != when {
			t.Errorf("%s: bob's server got %q", when, got)
		}
		p.bob.send(t, p.addr(1, 1), when)
		if got, _ := p.alice.receive(t); got != when {
			t.Errorf("%s: alice's server got %q", when, got)
		}
	}
	both("before")
	stopped := make(chan struct{})
	go func() { defer close(stopped); p.bob.stop() }()
	eventually(t, func() error {
		if !p.bob.draining.Load() {
			return errors.New("not draining")
		}
		return nil
	})
	for i := range 10 {
		both(fmt.Sprintf("during %d", i))
	}
	_ = near.Close()
	_ = far.Close()
	select {
	case <-stopped:
	case <-time.After(3 * time.Second):
		t.Error("not stopped 3 s after the last stream had ended")
	}
}

// A stranger that has sent half of a hello delays no stop.
func TestStrangersDoNotDelayTheStop(t *testing.T) {
	p := newPair(t)
	stranger, err := net.Dial("tcp4", p.bob.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Close() }()
	_, _ = io.WriteString(stranger, "\x16\x03\x01\x02\x00\x01")
	p.alice.send(t, p.addr(2, 1), "up")
	p.bob.receive(t)
	began := time.Now()
	p.bob.stop()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the stop took %v", took)
	}
}

// What the host refuses is told by New, and nothing stays bound.
func TestNewTellsWhatTheHostRefuses(t *testing.T) {
	p := newPair(t)
	second := *p.alice.cfg
	_, err := New(&second, Options{})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a second sidecar on the same addresses: %v", err)
	}
	p.alice.stop()
	again := p.start(t, p.alice.cfg)
	again.send(t, p.addr(2, 1), "again")
	if got, _ := p.bob.receive(t); !bytes.Equal([]byte(got), []byte("again")) {
		t.Errorf("bob's server got %q", got)
	}
}
