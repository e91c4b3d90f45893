package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"culvert/capture/ruleset"
	"culvert/catalog"
)

// What redirect refuses, and what it shares with nobody.

func TestRedirectTellsWhyNot(t *testing.T) {
	s := sites(t)["IPv4"]
	for what, c := range map[string]struct {
		spoil func(*RedirectOptions)
		peers []catalog.Peer
		want  string
	}{
		"a loopback server":        {func(o *RedirectOptions) { o.Server = netip.MustParseAddr("127.0.0.1") }, nil, "127.0.0.1 is no address that peers could know"},
		"a wildcard server":        {func(o *RedirectOptions) { o.Server = netip.IPv4Unspecified() }, nil, "0.0.0.0 is no address that peers could know"},
		"somebody else's address":  {func(o *RedirectOptions) { o.Server = s.bob }, nil, "10.2.0.1 is not an address of this host"},
		"this host as a peer":      {nil, []catalog.Peer{peer(bob, s.server)}, "dc2/bob at 10.1.0.1: the address is this host's own"},
		"a virtual address":        {nil, []catalog.Peer{peer(bob, bobAddr)}, "no server of another datacenter can have this address"},
		"one address for two":      {nil, []catalog.Peer{peer(bob, s.bob), peer(carol, s.bob)}, "dc2/carol at 10.2.0.1: peer dc2/bob has the same address"},
		"an address of IPv6":       {nil, []catalog.Peer{peer(bob, netip.MustParseAddr("fd02::1"))}, "IPv4 and IPv6"},
		"no listen port":           {func(o *RedirectOptions) { o.Listen = 0 }, nil, "Listen is required"},
		"no services":              {func(o *RedirectOptions) { o.Services = nil }, nil, "Services is required"},
		"less than no connections": {func(o *RedirectOptions) { o.MaxStreams = -1 }, nil, "MaxStreams is -1"},
	} {
		o := s.options(&recorder{})
		if c.spoil != nil {
			c.spoil(&o)
		}
		r, err := NewRedirect(c.peers, o)
		if err == nil {
			r.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", what, err, c.want)
		}
		if _, err := ruleset.New(ruleset.Spec{Listen: o.Listen}).Read(); !errors.Is(err, ruleset.ErrNoTable) {
			t.Errorf("%s left a table: %v", what, err)
		}
	}
}

// Without any route the kernel refuses the server's packets before a rule sees
// them: the operator is told, and what would help.
func TestRedirectWantsARoute(t *testing.T) {
	s := sites(t)["IPv4"]
	route := func(do string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "ip", "route", do, "default", "via", "10.1.0.254").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	route("del")
	r, err := NewRedirect([]catalog.Peer{peer(bob, s.bob)}, s.options(&recorder{}))
	route("add")
	if err == nil {
		r.Close()
	}
	fault, ok := errors.AsType[*PeerError](err)
	if !ok || !strings.Contains(err.Error(), "no route") || !strings.Contains(fault.Hint(), "ip route add 10.2.0.1/32") {
		t.Errorf("%v", err)
	}
}

// Of two sidecars with one listen port the second is told.
func TestRedirectHasOneOwner(t *testing.T) {
	s := sites(t)["IPv4"]
	c := s.start(t, s.options(nil), peer(bob, s.bob))
	if !ruleset.IsHeld(8443) || ruleset.IsHeld(8444) {
		t.Errorf("owned: %v and %v, want the first", ruleset.IsHeld(8443), ruleset.IsHeld(8444))
	}
	if _, err := NewRedirect(nil, s.options(&recorder{})); err == nil || !strings.Contains(err.Error(), "a running sidecar holds this table") {
		t.Errorf("a second sidecar with the same listen port: %v", err)
	}
	c.stop()
	if ruleset.IsHeld(8443) {
		t.Error("owned after the stop")
	}
}

// Rules tell servers apart by their ports: a second one with the same is refused,
// whether its sidecar runs or has left its table.
func TestRedirectTakesAPortOnce(t *testing.T) {
	s := sites(t)["IPv4"]
	c := s.start(t, s.options(nil), peer(bob, s.bob))
	second := s.options(&recorder{})
	second.Listen = 8444
	for range 2 {
		if _, err := NewRedirect(nil, second); err == nil || !strings.Contains(err.Error(), "is captured by table culvert_8443 already") {
			t.Errorf("a second sidecar for the same ports: %v", err)
		}
		c.stop()
	}
	for i := range second.Services {
		second.Services[i].Port++
	}
	r, err := NewRedirect(nil, second)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := r.table.Delete(); err != nil {
		t.Error(err)
	}
}

// The host's own address is never refused, whoever had it before.
func TestRedirectNeverRefusesTheServer(t *testing.T) {
	s := sites(t)["IPv4"]
	left := ruleset.New(ruleset.Spec{Listen: 8443, Ports: []ruleset.Port{{Packet: true, Service: gossipPort, Endpoint: 17946}}})
	was := ruleset.State{
		Peers: map[netip.Addr]ruleset.Peer{s.server: {Endpoint: netip.MustParseAddr("127.200.0.1"), Name: "dc2/old"}},
		Lost:  map[netip.Addr]string{s.dave: "dc2/dave"},
	}
	if err := left.Replace(was); err != nil {
		t.Fatal(err)
	}
	c := s.start(t, s.options(nil), peer(bob, s.bob))
	if lost := c.Status().Lost; len(lost) != 1 || lost[s.dave] == "" {
		t.Errorf("refused: %v, want dave's address alone", lost)
	}
}

// A sidecar with all its places taken is no firewall in the way, and no probe of
// its own becomes a stream of the server's.
func TestProbesBesideAFullHouse(t *testing.T) {
	s := sites(t)["IPv4"]
	h := &holding{recorder: recorder{packets: make(chan captured, 64)}, streams: make(chan string, 64), release: make(chan struct{})}
	o := s.options(h)
	o.MaxStreams = 2
	r, err := NewRedirect([]catalog.Peer{peer(bob, s.bob)}, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		<-done
		_ = r.table.Delete()
	}()
	var held []net.Conn
	for range 3 { // one waits
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(s.bob, gossipPort).String(), 2*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	eventually(t, "two streams are served", func() bool { return len(h.streams) == 2 })
	for range 3 {
		if err := r.probe(ctx); err != nil {
			t.Errorf("with all places taken: %v", err)
		}
	}
	close(h.release)
	for _, c := range held {
		_ = c.Close()
	}
	eventually(t, "the one that waited is served", func() bool { return len(h.streams) == 3 })
	if err := r.probe(ctx); err != nil {
		t.Errorf("with places free: %v", err)
	}
	if len(h.streams) != 3 || len(h.packets) != 0 {
		t.Errorf("%d streams and %d packets for bob, want the three streams", len(h.streams), len(h.packets))
	}
}

// holding is a handler that keeps streams until it is told to end them.
type holding struct {
	recorder
	streams chan string
	release chan struct{}
}

func (h *holding) Stream(ctx context.Context, _ catalog.Key, _ string, c *net.TCPConn) {
	h.streams <- c.RemoteAddr().String()
	select {
	case <-h.release:
	case <-ctx.Done():
	}
	_ = c.Close()
}

// An endpoint's address follows from its peer's name, whoever else there is, as
// long as two names do not meet; and then nobody's is another's.
func TestEndpointAddresses(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		spec := ruleset.Spec{V6: v6}
		var peers []catalog.Peer
		for i := range 5000 {
			peers = append(peers, catalog.Peer{Key: catalog.Key{Datacenter: "dc2", Node: fmt.Sprintf("n%d", i)}})
		}
		all := assign(peers, ruleset.State{}, v6)
		owners := make(map[netip.Addr]catalog.Key)
		moved := 0
		for key, at := range all {
			if other, taken := owners[at]; taken || !spec.Range().Contains(at) {
				t.Fatalf("%s has %v, within %v, and so has %v", key, at, spec.Range(), other)
			}
			owners[at] = key
			if alone := assign([]catalog.Peer{{Key: key}}, ruleset.State{}, v6); alone[key] != at {
				moved++
			}
		}
		if v6 && moved > 0 || moved > 500 {
			t.Errorf("%d of 5000 had to move", moved)
		}
		// Who has one keeps it, though it would get another.
		odd := spec.Range().Addr().Next()
		old := ruleset.State{Peers: map[netip.Addr]ruleset.Peer{bobAddr: {Endpoint: odd, Name: "dc2/n7"}}}
		if got := assign(peers, old, v6)[peers[7].Key]; got != odd {
			t.Errorf("a peer with an endpoint got %v, had %v", got, odd)
		}
	}
}

func TestEndpointPorts(t *testing.T) {
	for service, want := range map[uint16]uint16{7946: 17946, 8300: 18300, 55535: 65535, 55536: 1024, 65535: 11023} {
		got := endpointPorts(service, nil)
		if got[0] != want {
			t.Errorf("port %d: %v, want %d first", service, got, want)
		}
		for _, p := range got {
			if p < 1024 || p == service {
				t.Errorf("port %d: %d is among %v", service, p, got)
			}
		}
	}
	if got := endpointPorts(7946, map[uint16]bool{17946: true}); got[0] != 27946 {
		t.Errorf("where the server has 17946 itself: %v, want 27946 first", got)
	}
}
