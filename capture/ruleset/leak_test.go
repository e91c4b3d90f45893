package ruleset

import (
	"bytes"
	"net"
	"net/netip"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
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
	if err != nil || len(chains) != len(other.chains(next.sets())) {
		t.Errorf("%d chains, %v, want %d", len(chains), err, len(other.chains(next.sets())))
	}
}
