package ruleset

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What these tests send says so, and is looked for on the other end of the link.
var marker = []byte("must not leave")

// A wire counts the frames with the marker that leave the host.
type wire struct{ seen atomic.Int64 }

func watchWire(t *testing.T) *wire {
	t.Helper()
	far, err := net.InterfaceByName("far")
	if err != nil {
		t.Fatal(err)
	}
	all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: far.Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}); err != nil {
		t.Fatal(err)
	}
	w := &wire{}
	var stopping atomic.Bool
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 2048)
		for !stopping.Load() {
			if n, _, err := unix.Recvfrom(fd, buf, 0); err == nil && bytes.Contains(buf[:n], marker) {
				w.seen.Add(1)
			}
		}
	})
	t.Cleanup(func() {
		stopping.Store(true)
		done.Wait()
		_ = unix.Close(fd)
	})
	return w
}

// wantNothing checks that nothing more has left, soon after it could have.
func (w *wire) wantNothing(t *testing.T, what string) {
	t.Helper()
	<-time.After(150 * time.Millisecond)
	if n := w.seen.Swap(0); n != 0 {
		t.Errorf("%s: %d packets left plainly", what, n)
	}
}

func (f family) sender(t *testing.T, device string) *net.UDPConn {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if device != "" {
			_ = c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device) })
		}
		return err
	}}
	c, err := lc.ListenPacket(t.Context(), map[bool]string{false: "udp4", true: "udp6"}[f.v6], wildcard(f, servicePort).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.UDPConn)
}

// While the table is made anew, and while addresses pass between captured and
// refused, not one packet leaves, however fast they are sent.
func TestNothingLeavesWhileRulesChange(t *testing.T) {
	for name, f := range families(t) {
		captured := f.state()
		refused := State{Peers: map[netip.Addr]Peer{}, Lost: map[netip.Addr]string{f.lost: "dc2/carol", f.bob: "dc2/bob"}}
		renamed := State{Peers: map[netip.Addr]Peer{f.bob: {f.endpoint.Next(), "dc2/bob"}}, Lost: captured.Lost}
		for what, step := range map[string]func(*Table, int) error{
			"made anew": func(table *Table, _ int) error { return table.Replace(captured) },
			"captured and refused": func(table *Table, i int) error {
				return table.Change([]State{captured, refused}[i%2], []State{refused, captured}[i%2])
			},
			"another endpoint": func(table *Table, i int) error {
				return table.Change([]State{captured, renamed}[i%2], []State{renamed, captured}[i%2])
			},
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				wire := watchWire(t)
				table := install(t, f.spec(), captured)
				c := f.sender(t, "")
				var stop atomic.Bool
				var sending sync.WaitGroup
				sending.Go(func() {
					for !stop.Load() {
						_, _ = c.WriteToUDPAddrPort(marker, netip.AddrPortFrom(f.bob, servicePort))
					}
				})
				defer sending.Wait()
				defer stop.Store(true)
				for i, began := 0, time.Now(); time.Since(began) < 1500*time.Millisecond; i++ {
					if err := step(table, i); err != nil {
						t.Fatal(err)
					}
				}
				stop.Store(true)
				sending.Wait()
				wire.wantNothing(t, what)
			})
		}
	}
}

// What has been turned goes to the loopback interface or nowhere: not where the
// range has lost its route, and not from a socket that is bound to another
// interface.
func TestNothingTurnedLeaves(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			wire := watchWire(t)
			table := install(t, f.spec(), f.state())
			send := func(c *net.UDPConn) {
				for range 3 {
					_, _ = c.WriteToUDPAddrPort(marker, netip.AddrPortFrom(f.bob, servicePort))
				}
			}
			bound := f.sender(t, "eth0")
			send(bound)
			wire.wantNothing(t, "from a socket of eth0")
			_ = bound.Close()
			free := f.sender(t, "")
			if out, err := exec.CommandContext(t.Context(), "sh", "-ec", "ip link set lo down; ip link set lo up").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			send(free)
			wire.wantNothing(t, "after the loopback interface was down")
			if _, err := table.Read(); f.v6 != (err != nil) {
				t.Errorf("after the loopback interface was down the table reads as %v", err)
			}
			if err := table.Replace(f.state()); err != nil {
				t.Fatal(err)
			}
			wantState(t, table, f.state())
		})
	}
}

// A map of services that somebody has flushed is noticed and made anew, and so is
// a table of other services.
func TestServicesAreRestored(t *testing.T) {
	f := families(t)["IPv4"]
	table := install(t, f.spec(), f.state())
	for _, set := range []*nftables.Set{table.sets().out, table.sets().in} {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		c.FlushSet(set)
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := table.Read(); err != ErrDamaged {
			t.Errorf("%s flushed: %v, want ErrDamaged", set.Name, err)
		}
		if err := table.Replace(f.state()); err != nil {
			t.Fatal(err)
		}
		wantState(t, table, f.state())
	}
	other := f.spec()
	other.Ports = []Port{{Packet: true, Service: 8301, Endpoint: 17946}}
	next := New(other)
	if _, err := next.Read(); err != ErrDamaged {
		t.Errorf("with other services: %v, want ErrDamaged", err)
	}
	if err := next.Replace(f.state()); err != nil {
		t.Fatal(err)
	}
	wantState(t, next, f.state())
	if ports, err := next.Services(); err != nil || len(ports) != 1 || ports[0] != (Port{Packet: true, Service: 8301}) {
		t.Errorf("services %v, %v", ports, err)
	}
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	chains = slices.DeleteFunc(chains, func(one *nftables.Chain) bool { return one.Table.Name != next.Name() })
	if err != nil || len(chains) != len(other.chains(next.sets())) {
		t.Errorf("%d chains, %v, want %d", len(chains), err, len(other.chains(next.sets())))
	}
}

// sh runs a script, and another one when the test ends.
func sh(t *testing.T, script, undo string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if undo != "" {
		t.Cleanup(func() {
			if out, err := exec.Command("sh", "-ec", undo).CombinedOutput(); err != nil { //nolint:noctx // the test's has ended
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// rejecting is a firewall that answers what comes from the service's port with an
// error that quotes it.
const rejecting = `nft 'table inet rejecting { chain in { type filter hook input priority 0;
  meta l4proto { tcp, udp } th sport 7946 reject with icmpx admin-prohibited; }; }'`

// losing is a firewall that drops all fragments but the first.
const losing = `nft 'table inet losing { chain pre { type filter hook prerouting priority -500;
  ip frag-off & 0x1fff != 0 drop; frag frag-off != 0 drop; }; }'
ip link set lo mtu 1500
sysctl -qw net.ipv4.ipfrag_time=1 net.ipv6.ip6frag_time=1`

// A packet of a peer's has the peer's address, and so the kernel's answer, if it
// does not reach the server, would leave for the peer and quote it. It does not;
// one to somebody else does.
func TestErrorsDoNotLeave(t *testing.T) {
	for name, f := range families(t) {
		for what, way := range map[string]struct {
			do, undo string
			size     int
			wait     time.Duration
		}{
			"a server that is down":   {size: 200},
			"a firewall that rejects": {do: rejecting, undo: "nft delete table inet rejecting", size: 200},
			"a fragment that is lost": {
				do: losing, undo: "nft delete table inet losing; ip link set lo mtu 65536; sysctl -qw net.ipv4.ipfrag_time=30 net.ipv6.ip6frag_time=60",
				size: 4000, wait: 2 * time.Second,
			},
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				wire := watchWire(t)
				sidecar := listenSidecar(t, f)
				install(t, f.spec(), f.state())
				if way.do != "" {
					sh(t, way.do, way.undo)
				}
				send := func(from netip.Addr) {
					payload := bytes.Repeat(marker, way.size/len(marker))
					if err := sidecar.deliver(from, netip.AddrPortFrom(f.server, servicePort), payload); err != nil {
						t.Fatal(err)
					}
				}
				send(f.bob)
				send(f.lost)
				<-time.After(way.wait)
				wire.wantNothing(t, "to a peer and to one that is lost")
				send(f.plainly)
				for end := time.Now().Add(way.wait + 10*time.Second); wire.seen.Load() == 0; <-time.After(10 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("nothing left for somebody else: the test sees nothing")
					}
				}
			})
		}
	}
}

// The same of a connection.
func TestErrorsOfConnectionsDoNotLeave(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			wire := watchWire(t)
			lc := net.ListenConfig{Control: freebind}
			ln, err := lc.Listen(t.Context(), "tcp", netip.AddrPortFrom(f.endpoint, endpointPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ln.Close() }()
			install(t, f.spec(), f.state())
			_ = dialTCP(t, f.bob, 0)
			c, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			sh(t, rejecting, "nft delete table inet rejecting")
			if _, err := c.Write(marker); err != nil {
				t.Fatal(err)
			}
			wire.wantNothing(t, "to a peer")
		})
	}
}

// Where the server's address is this host's no more, what the sidecar hands it
// does not leave in the peer's name.
func TestNothingLeavesInAPeersName(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			wire := watchWire(t)
			sidecar := listenSidecar(t, f)
			install(t, f.spec(), f.state())
			if err := sidecar.deliver(f.bob, netip.AddrPortFrom(f.plainly, servicePort), marker); !errors.Is(err, syscall.EPERM) {
				t.Errorf("%v, want EPERM", err)
			}
			wire.wantNothing(t, "to an address that is gone")
		})
	}
}

// Nobody but the sidecar gets a service's port by sending from its endpoint's.
func TestOthersDoNotSpeakForPeers(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			server := listenUDP(t, wildcard(f, servicePort))
			install(t, f.spec(), f.state())
			for _, at := range []netip.Addr{f.server, f.endpoint} {
				foreign := listenUDP(t, netip.AddrPortFrom(at, endpointPort))
				if _, err := foreign.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(f.server, servicePort)); err != nil {
					t.Fatal(err)
				}
				if _, from := read(t, server); from != netip.AddrPortFrom(at, endpointPort) {
					t.Errorf("from %v:%d the server got a packet from %v", at, endpointPort, from)
				}
			}
		})
	}
}

// installOlder leaves a table as the first sidecars with redirect did, which gave
// packets their peers' addresses on the way in.
func installOlder(t *testing.T, f family) {
	t.Helper()
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	s, h, table := f.spec(), headerOf(f.v6), New(f.spec())
	of, own := table.sets(), c.AddTable(table.table())
	for _, set := range []*nftables.Set{of.peers, of.back, of.lost, of.out, of.in} {
		if err := c.AddSet(set, nil); err != nil {
			t.Fatal(err)
		}
	}
	chains := []chain{
		{name: "in_unreachable", rules: [][]expr.Any{rule(accept())}},
		{name: "in_outside", rules: [][]expr.Any{rule(within(h.dst, s.Range()), drop())}},
	}
	var out, in []nftables.SetElement
	for _, p := range s.Ports {
		outward, inward := s.outward(h, p, of), s.inward(h, p, of)
		chains = append(chains, outward, inward)
		proto, _ := transport(p.Packet)
		out, in = append(out, entry(proto, p.Service, outward.name)), append(in, entry(proto, p.Endpoint, inward.name))
	}
	in = append(in, entry(h.icmp, 0x0303, "in_unreachable"))
	chains = append(chains,
		chain{"out", nftables.ChainHookOutput, nftables.ChainTypeRoute, [][]expr.Any{rule(service(dportOffset, of.out))}},
		chain{"in", nftables.ChainHookInput, nftables.ChainTypeFilter, [][]expr.Any{
			rule(notLoopback(expr.MetaKeyIIF), proceed("in_outside")), rule(service(sportOffset, of.in)),
		}},
		chain{"post", nftables.ChainHookPostrouting, nftables.ChainTypeFilter, [][]expr.Any{
			rule(notLoopback(expr.MetaKeyOIF), within(h.dst, s.Range()), drop()),
		}})
	added := make([]*nftables.Chain, len(chains))
	for i, one := range chains {
		added[i] = &nftables.Chain{Table: own, Name: one.name}
		if one.hook != nil {
			added[i].Hooknum, added[i].Type, added[i].Priority = one.hook, one.kind, nftables.ChainPriorityRef(priority)
		}
		c.AddChain(added[i])
	}
	if err := errors.Join(of.change(c, elements{}, f.state().elements()), c.SetAddElements(of.out, out), c.SetAddElements(of.in, in)); err != nil {
		t.Fatal(err)
	}
	for i, one := range chains {
		for _, exprs := range one.rules {
			c.AddRule(&nftables.Rule{Table: own, Chain: added[i], Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// A table of an older sidecar's is known as one, and becomes one of this kind
// without a moment in which anything leaves.
func TestOlderTableIsReplaced(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			wire, table := watchWire(t), New(f.spec())
			c := f.sender(t, "")
			for range 10 {
				if err := errors.Join(table.Replace(State{}), deleteTable(table)); err != nil { // leaves the range local
					t.Fatal(err)
				}
				installOlder(t, f)
				if found, err := table.Read(); !errors.Is(err, ErrDamaged) || found.Peers[f.bob] != f.state().Peers[f.bob] {
					t.Fatalf("an older table reads as %v, %v", found, err)
				}
				var stop atomic.Bool
				var sending sync.WaitGroup
				sending.Go(func() {
					for !stop.Load() {
						_, _ = c.WriteToUDPAddrPort(marker, netip.AddrPortFrom(f.bob, servicePort))
					}
				})
				<-time.After(20 * time.Millisecond)
				err := replaceInPlace(table, f.state())
				<-time.After(20 * time.Millisecond)
				stop.Store(true)
				sending.Wait()
				if err != nil {
					t.Fatal(err)
				}
				wantState(t, table, f.state())
			}
			names, err := table.chains()
			if want := f.spec().chains(table.sets()); err != nil || len(names) != len(want) {
				t.Errorf("the chains are %v, %v, want %d", names, err, len(want))
			}
			wire.wantNothing(t, "while an older table was replaced")
			if err := table.Delete(); err != nil {
				t.Error(err)
			}
		})
	}
}

func deleteTable(t *Table) error {
	c, err := dial()
	if err != nil {
		return err
	}
	c.DelTable(t.table())
	return c.Flush()
}

// replaceInPlace is Replace where that has no other way out.
func replaceInPlace(t *Table, s State) error {
	c, err := dial()
	if err != nil {
		return err
	}
	found, err := t.read(c)
	if err != nil {
		return err
	}
	return t.inPlace(found, s.elements())
}

// chains are the names of those that are there.
func (t *Table) chains() ([]string, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	all, err := c.ListChainsOfTableFamily(t.table().Family)
	var names []string
	for _, chain := range all {
		if chain.Table.Name == t.Name() {
			names = append(names, chain.Name)
		}
	}
	return names, err
}
