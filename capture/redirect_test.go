package capture

import (
	"context"
	"errors"
	"io"
	"maps"
	"math"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/capture/ruleset"
	"culvert/catalog"
	"culvert/internal/testnetns"
)

// These tests change rules of the kernel, in a namespace of their own.

const gossipPort = 7946

// A site is the addresses of one test.
type site struct {
	server           netip.Addr
	bob, carol, dave netip.Addr
}

func sites(t *testing.T) map[string]site {
	t.Helper()
	testnetns.Require(t)
	a := netip.MustParseAddr
	return map[string]site{
		"IPv4": {a("10.1.0.1"), a("10.2.0.1"), a("10.2.0.2"), a("10.2.0.3")},
		"IPv6": {a("fd01::1"), a("fd02::1"), a("fd02::2"), a("fd02::3")},
	}
}

func (s site) wildcard() netip.AddrPort {
	if s.server.Is6() {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), gossipPort)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), gossipPort)
}

func (s site) options(h Handler) RedirectOptions {
	local := netip.AddrPortFrom(s.server, gossipPort)
	return RedirectOptions{Self: self, Server: s.server, Listen: 8443, Handler: h, Services: []Service{
		{Name: "gossip-packet", Packet: true, Port: gossipPort, Local: local},
		{Name: "gossip-stream", Port: gossipPort, Local: local},
	}}
}

// A captive is a server on all addresses and a Redirect before it.
type captive struct {
	site
	*Redirect
	handler *recorder
	udp     *net.UDPConn
	tcp     *net.TCPListener
	stop    func()
}

func (s site) start(t *testing.T, o RedirectOptions, peers ...catalog.Peer) *captive {
	t.Helper()
	c := &captive{site: s, handler: &recorder{packets: make(chan captured, 64)}}
	lc := net.ListenConfig{}
	at := s.wildcard()
	udp, err := lc.ListenPacket(t.Context(), "udp"+family(s.server), at.String())
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := lc.Listen(t.Context(), "tcp"+family(s.server), at.String())
	if err != nil {
		t.Fatal(err)
	}
	c.udp, c.tcp = udp.(*net.UDPConn), tcp.(*net.TCPListener)
	o.Handler = c.handler
	c.Redirect, err = NewRedirect(peers, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		_, _ = c.udp.Close(), c.tcp.Close()
	})
	t.Cleanup(func() {
		c.stop()
		if err := c.table.Delete(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *captive) send(t *testing.T, to netip.Addr, payload string) {
	t.Helper()
	if _, err := c.udp.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(to, gossipPort)); err != nil {
		t.Fatal(err)
	}
}

func (c *captive) wantCaptured(t *testing.T, to catalog.Key, payload string) {
	t.Helper()
	select {
	case got := <-c.handler.packets:
		if want := (captured{to, "gossip-packet", payload}); got != want {
			t.Errorf("captured %d bytes to %s, want %d to %s", len(got.payload), got.to, len(payload), to)
		}
	case <-time.After(5 * time.Second):
		t.Errorf("nothing was captured on its way to %s", to)
	}
}

func (c *captive) wantReceived(t *testing.T, from netip.Addr, payload string) {
	t.Helper()
	_ = c.udp.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 65536)
	n, src, err := c.udp.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	if want := netip.AddrPortFrom(from, gossipPort); string(buf[:n]) != payload || src != want {
		t.Errorf("the server got %d bytes from %v, want %d from %v", n, src, len(payload), want)
	}
}

// dialPeer is the server's own connection to a peer.
func (c *captive) dialPeer(t *testing.T, to netip.Addr) (string, error) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, gossipPort).String(), 2*time.Second)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	got, err := io.ReadAll(conn)
	return string(got), err
}

func TestRedirectCarries(t *testing.T) {
	for name, s := range sites(t) {
		t.Run(name, func(t *testing.T) {
			c := s.start(t, s.options(nil), peer(bob, s.bob), peer(carol, s.carol))
			for _, size := range []int{1, 1400, 8 << 10, 60000} {
				payload := strings.Repeat("x", size)
				c.send(t, s.bob, payload)
				c.wantCaptured(t, bob, payload)
				if err := deliver(c, carol, "gossip-packet", []byte(payload)); err != nil {
					t.Error(err)
				}
				c.wantReceived(t, s.carol, payload)
			}
			if got, err := c.dialPeer(t, s.carol); err != nil || got != "to dc2/carol gossip-stream\n" {
				t.Errorf("a stream to carol: %q, %v", got, err)
			}
			for range 2 {
				conn, err := c.DialServer(t.Context(), bob, "gossip-stream")
				if err != nil {
					t.Fatal(err)
				}
				accepted, err := c.tcp.AcceptTCP()
				if err != nil {
					t.Fatal(err)
				}
				if from := remoteOf(accepted); from != c.Status().Endpoints[bob] {
					t.Errorf("a stream of bob's came from %v, want %v", from, c.Status().Endpoints[bob])
				}
				_, _ = conn.Close(), accepted.Close()
			}
			if err := deliver(c, catalog.Key{Datacenter: "dc2", Node: "eve"}, "gossip-packet", nil); err != ErrNoEndpoint {
				t.Errorf("a packet of a stranger's: %v", err)
			}
			if err := deliver(c, bob, "gossip-stream", nil); err != ErrNoEndpoint {
				t.Errorf("a packet for a stream service: %v", err)
			}
			if st := c.Status(); st.Blocked != "" || st.Table != "culvert_8443" || len(st.Lost) != 0 {
				t.Errorf("status %+v", st)
			}
		})
	}
}

// strict is what a hardened host has against sources that are not where they
// should be: the kernel's own filter and that of firewalld.
const strict = `sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.lo.rp_filter=1
nft 'table inet strict { chain pre { type filter hook prerouting priority -290; fib saddr . iif oif missing drop; }; }'`

// The server may listen on another address and port than its peers know, and the
// host be strict with sources that are other hosts'.
func TestRedirectDeliversOnAStrictHost(t *testing.T) {
	for name, s := range sites(t) {
		t.Run(name, func(t *testing.T) {
			if out, err := exec.CommandContext(t.Context(), "sh", "-ec", strict).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			defer func() {
				if out, err := exec.Command("sh", "-ec", "nft delete table inet strict; sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.lo.rp_filter=0").CombinedOutput(); err != nil { //nolint:noctx // at once
					t.Errorf("%v: %s", err, out)
				}
			}()
			loopback := netip.MustParseAddr("127.0.0.1")
			if s.server.Is6() {
				loopback = netip.IPv6Loopback()
			}
			for _, local := range []netip.AddrPort{netip.AddrPortFrom(s.server, gossipPort), netip.AddrPortFrom(s.server, 7999), netip.AddrPortFrom(loopback, 7999)} {
				o := s.options(nil)
				o.Services[0].Local = local
				c := s.start(t, o, peer(bob, s.bob))
				if local.Port() != gossipPort {
					_ = c.udp.Close()
					var err error
					if c.udp, err = net.ListenUDP("udp"+family(local.Addr()), net.UDPAddrFromAddrPort(local)); err != nil {
						t.Fatal(err)
					}
				}
				if err := deliver(c, bob, "gossip-packet", []byte("to "+local.String())); err != nil {
					t.Error(err)
				}
				c.wantReceived(t, s.bob, "to "+local.String())
				if err := c.probe(t.Context()); err != nil {
					t.Error(err)
				}
				c.stop()
			}
		})
	}
}

// A voice keeps off the ports that the server will want, and is silent once it is
// closed.
func TestVoice(t *testing.T) {
	for name, s := range sites(t) {
		t.Run(name, func(t *testing.T) {
			taken := make(map[uint16]bool)
			for port := uint16(1); port != 0; port++ {
				taken[port] = port%16 != 0
			}
			v, err := openVoice(s.server.Is6(), taken)
			if err != nil || taken[v.port] {
				t.Fatalf("%v: port %d, want one that is not taken", err, v.port)
			}
			v.close()
			v.close()
			if _, err := v.send(new(outlets), [][]byte{nil}, sourceControl(s.bob), sockaddr(netip.AddrPortFrom(s.server, 1))); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after close: %v", err)
			}
		})
	}
}

func TestDeliverDoesNotAllocate(t *testing.T) {
	for name, s := range sites(t) {
		t.Run(name, func(t *testing.T) {
			c := s.start(t, s.options(nil), peer(bob, s.bob))
			for _, packets := range [][][]byte{make([][]byte, 1), slices.Repeat([][]byte{[]byte("x")}, 40)} {
				least := math.Inf(1)
				for range 10 { // the redirect looks after its rules meanwhile
					least = min(least, testing.AllocsPerRun(20, func() { _, _ = c.Deliver(bob, "gossip-packet", packets) }))
				}
				if least != 0 {
					t.Errorf("%v allocations for %d packets", least, len(packets))
				}
			}
		})
	}
}

// Peers come, move and go under one who stays.
func TestRedirectFollowsTheCatalog(t *testing.T) {
	for name, s := range sites(t) {
		t.Run(name, func(t *testing.T) {
			c := s.start(t, s.options(nil), peer(bob, s.bob), peer(carol, s.carol))
			before := c.Status().Endpoints
			sibling := catalog.Key{Datacenter: self.Datacenter, Node: "amy"}
			set := func(peers ...catalog.Peer) {
				t.Helper()
				if err := c.Set(peers); err != nil {
					t.Fatal(err)
				}
				c.send(t, s.bob, "to bob")
				c.wantCaptured(t, bob, "to bob")
			}
			wantLost := func(want map[netip.Addr]string) {
				t.Helper()
				if got := c.Status().Lost; !maps.Equal(got, want) {
					t.Errorf("refused: %v, want %v", got, want)
				}
				for at := range want {
					if _, err := c.dialPeer(t, at); !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("a stream to %v: %v, want refused", at, err)
					}
				}
			}
			set(peer(bob, s.bob), peer(carol, s.dave)) // carol moves
			c.send(t, s.dave, "to carol")
			c.wantCaptured(t, carol, "to carol")
			if now := c.Status().Endpoints; !maps.Equal(now, before) {
				t.Errorf("endpoints %v, before %v", now, before)
			}
			wantLost(map[netip.Addr]string{s.carol: "dc2/carol"})
			set(peer(bob, s.bob)) // and leaves
			wantLost(map[netip.Addr]string{s.carol: "dc2/carol", s.dave: "dc2/carol"})
			set(peer(bob, s.bob), peer(sibling, s.dave)) // its address is a sibling's now
			wantLost(map[netip.Addr]string{s.carol: "dc2/carol"})
			set(peer(bob, s.bob), peer(carol, s.carol)) // it comes back
			wantLost(map[netip.Addr]string{})

			bad := peer(carol, s.server)
			if err := c.Set([]catalog.Peer{bad}); err == nil {
				t.Error("a peer with this host's address was taken")
			}
			c.send(t, s.bob, "still")
			c.wantCaptured(t, bob, "still")
		})
	}
}

// After its end a sidecar's peers are refused until the next one takes over,
// which finds what the last one knew. Who says open lets them go.
func TestRedirectFailsClosed(t *testing.T) {
	s := sites(t)["IPv4"]
	first := s.start(t, s.options(nil), peer(bob, s.bob), peer(carol, s.carol))
	if err := first.Set([]catalog.Peer{peer(bob, s.bob)}); err != nil {
		t.Fatal(err)
	}
	endpoint := first.Status().Endpoints[bob]
	first.stop()
	for _, to := range []netip.Addr{s.bob, s.carol} {
		if _, err := first.dialPeer(t, to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a stream to %v after the stop: %v, want refused", to, err)
		}
	}
	second := s.start(t, s.options(nil), peer(bob, s.bob))
	second.send(t, s.bob, "again")
	second.wantCaptured(t, bob, "again")
	if st := second.Status(); st.Endpoints[bob] != endpoint || st.Lost[s.carol] != "dc2/carol" {
		t.Errorf("after the restart: %+v, want endpoint %v and carol refused", st, endpoint)
	}
	second.stop()

	o := s.options(nil)
	o.Open = true
	third := s.start(t, o, peer(bob, s.bob))
	if st := third.Status(); len(st.Lost) != 0 {
		t.Errorf("refused with on_exit open: %v", st.Lost)
	}
	if err := third.Set(nil); err != nil || len(third.Status().Lost) != 0 {
		t.Errorf("a peer that left is refused with on_exit open: %v, %v", third.Status().Lost, err)
	}
	third.stop()
	if _, err := third.table.Read(); !errors.Is(err, ruleset.ErrNoTable) {
		t.Errorf("after a stop with on_exit open: %v, want no table", err)
	}
}

// Rules that somebody else takes away come back; an address that the operator
// lets go stays so.
func TestRedirectRepairs(t *testing.T) {
	s := sites(t)["IPv4"]
	o := s.options(nil)
	o.Metrics = NewMetrics(prometheus.NewRegistry())
	c := s.start(t, o, peer(bob, s.bob), peer(carol, s.carol))
	if err := c.Set([]catalog.Peer{peer(bob, s.bob)}); err != nil {
		t.Fatal(err)
	}
	if err := c.table.Delete(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the table is made anew", func() bool {
		_, err := c.table.Read()
		return err == nil && testutil.ToFloat64(o.Metrics.repairs) == 1
	})
	c.send(t, s.bob, "x")
	c.wantCaptured(t, bob, "x")
	found, err := c.table.Read()
	if err != nil || found.Lost[s.carol] != "dc2/carol" {
		t.Fatalf("made anew as %+v, %v", found, err)
	}
	let := ruleset.State{Peers: found.Peers}
	if err := c.table.Change(found, let); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the address is let go", func() bool { return len(c.Status().Lost) == 0 })
	if n := testutil.ToFloat64(o.Metrics.repairs); n != 1 {
		t.Errorf("%v repairs, want 1", n)
	}
}

// A name that is longer than the kernel keeps is no change by others.
func TestRedirectKeepsLongNames(t *testing.T) {
	s := sites(t)["IPv4"]
	o := s.options(nil)
	o.Metrics = NewMetrics(prometheus.NewRegistry())
	long := catalog.Key{Datacenter: "dc2", Node: strings.Repeat("n.", 120) + "n"}
	c := s.start(t, o, peer(long, s.bob))
	c.send(t, s.bob, "x")
	c.wantCaptured(t, long, "x")
	if err := c.Set([]catalog.Peer{peer(long, s.carol)}); err != nil {
		t.Fatal(err)
	}
	c.repair()
	if n := testutil.ToFloat64(o.Metrics.repairs); n != 0 {
		t.Errorf("%v repairs", n)
	}
}

// A server that changes from one family to the other finds a table of the old.
func TestRedirectChangesFamily(t *testing.T) {
	all := sites(t)
	for _, names := range [][2]string{{"IPv4", "IPv6"}, {"IPv6", "IPv4"}} {
		old, now := all[names[0]], all[names[1]]
		first := old.start(t, old.options(nil), peer(bob, old.bob), peer(carol, old.carol))
		if err := first.Set([]catalog.Peer{peer(bob, old.bob)}); err != nil {
			t.Fatal(err)
		}
		first.stop()
		second := now.start(t, now.options(nil), peer(bob, now.bob))
		second.send(t, now.bob, "x")
		second.wantCaptured(t, bob, "x")
		if lost := second.Status().Lost; len(lost) != 0 {
			t.Errorf("from %s to %s: refused %v", names[0], names[1], lost)
		}
		second.stop()
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); <-time.After(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}
