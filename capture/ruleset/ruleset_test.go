package ruleset

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"culvert/internal/testnetns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(testnetns.Main(m)) }

const (
	servicePort  = 7946
	endpointPort = 17946
)

// A family is the addresses of one test.
type family struct {
	v6                         bool
	server, bob, lost, plainly netip.Addr
	endpoint                   netip.Addr
}

func families(t *testing.T) map[string]family {
	t.Helper()
	testnetns.Require(t)
	a := netip.MustParseAddr
	return map[string]family{
		"IPv4": {false, a("10.1.0.1"), a("10.2.0.1"), a("10.2.0.9"), a("10.2.0.7"), a("127.200.3.4")},
		"IPv6": {true, a("fd01::1"), a("fd02::1"), a("fd02::9"), a("fd02::7"), a("fd63:756c:7665:7274::3:4")},
	}
}

func (f family) spec() Spec {
	return Spec{Listen: 8443, V6: f.v6, Ports: []Port{
		{Packet: true, Service: servicePort, Endpoint: endpointPort, Voice: endpointPort}, {Service: servicePort, Endpoint: endpointPort},
	}}
}

func (f family) state() State {
	return State{
		Peers: map[netip.Addr]Peer{f.bob: {f.endpoint, "dc2/bob"}},
		Lost:  map[netip.Addr]string{f.lost: "dc2/carol"},
	}
}

// install makes the table, which the end of the test takes away.
func install(t *testing.T, spec Spec, s State) *Table {
	t.Helper()
	table := New(spec)
	if err := table.Replace(s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Delete(); err != nil {
			t.Error(err)
		}
	})
	return table
}

func wantState(t *testing.T, table *Table, want State) {
	t.Helper()
	got, err := table.Read()
	if err != nil || !maps.Equal(got.Peers, want.Peers) || !maps.Equal(got.Lost, want.Lost) {
		t.Errorf("read %+v, %v; want %+v", got, err, want)
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]uint16{"culvert_8443": 8443, "culvert_0": 0, "culvert_65535": 65535} {
		if got, ok := Listen(name); !ok || got != want || Name(want) != name {
			t.Errorf("%s: %d, %v", name, got, ok)
		}
	}
	for _, name := range []string{"culvert_", "culvert_65536", "culvert_08443", "culvert_x", "filter", "culvert_84 "} {
		if port, ok := Listen(name); ok {
			t.Errorf("%q is taken for the table of port %d", name, port)
		}
	}
}

// What the kernel refuses is told in terms of what is missing.
func TestErrorsAreTold(t *testing.T) {
	for errno, want := range map[syscall.Errno]error{
		syscall.EPERM: ErrPermission, syscall.EPROTONOSUPPORT: ErrUnsupported, syscall.EOPNOTSUPP: ErrUnsupported, syscall.EBUSY: syscall.EBUSY,
	} {
		err := plain(fmt.Errorf("netlink: %w", errno))
		if !errors.Is(err, want) {
			t.Errorf("%v is told as %v, want %v", errno, err, want)
		}
	}
	for _, err := range []error{ErrPermission, ErrUnsupported, ErrHeld} {
		if h, ok := errors.AsType[*hinted](err); !ok || h.Hint() == "" {
			t.Errorf("%v has no remedy", err)
		}
	}
}

func TestStateIsKept(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			if _, err := New(f.spec()).Read(); !errors.Is(err, ErrNoTable) {
				t.Errorf("before: %v, want ErrNoTable", err)
			}
			if err := New(f.spec()).Delete(); err != nil {
				t.Errorf("delete what is not there: %v", err)
			}
			table := install(t, f.spec(), f.state())
			wantState(t, table, f.state())
			next := State{Peers: map[netip.Addr]Peer{
				f.lost:    {f.endpoint, "dc2/carol"}, // takes over bob's endpoint
				f.plainly: {f.endpoint.Next(), "dc2/dave"},
			}, Lost: map[netip.Addr]string{f.bob: "dc2/bob"}}
			if err := table.Change(f.state(), next); err != nil {
				t.Fatal(err)
			}
			wantState(t, table, next)
			if err := table.Replace(f.state()); err != nil {
				t.Fatal(err)
			}
			wantState(t, table, f.state())
		})
	}
}

// The number of peers is no problem of the transaction's size.
func TestManyPeers(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			s := State{Peers: make(map[netip.Addr]Peer), Lost: make(map[netip.Addr]string)}
			at, endpoint := f.bob, f.endpoint
			for i := range 5000 {
				at, endpoint = at.Next(), endpoint.Next()
				s.Peers[at] = Peer{endpoint, fmt.Sprintf("dc2/%s-%d", strings.Repeat("n", 60), i)}
			}
			for i := range 500 {
				at = at.Next()
				s.Lost[at] = fmt.Sprintf("dc3/node-%d", i)
			}
			wantState(t, install(t, f.spec(), s), s)
		})
	}
}

func TestDamage(t *testing.T) {
	f := families(t)["IPv4"]
	table := install(t, f.spec(), f.state())
	sets := table.sets()
	for what, damage := range map[string]func(*nftables.Conn){
		"a chain without rules": func(c *nftables.Conn) {
			c.FlushChain(&nftables.Chain{Table: table.table(), Name: "in"})
		},
		"an element of back gone": func(c *nftables.Conn) {
			_ = c.SetDeleteElements(sets.back, []nftables.SetElement{{Key: f.endpoint.AsSlice()}})
		},
		"an element of peers gone": func(c *nftables.Conn) {
			_ = c.SetDeleteElements(sets.peers, []nftables.SetElement{{Key: f.bob.AsSlice()}})
		},
	} {
		if err := table.Replace(f.state()); err != nil {
			t.Fatal(err)
		}
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		damage(c)
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := table.Read(); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, want ErrDamaged", what, err)
		}
	}
}

// Tables of others, sidecars and not, are left as they are.
func TestOtherTables(t *testing.T) {
	f := families(t)["IPv4"]
	c, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	foreign := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"})
	c.AddChain(&nftables.Chain{Table: foreign, Name: "out"})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	second := f.spec()
	second.Listen = 8444
	t.Run("both", func(t *testing.T) {
		one, two := install(t, f.spec(), f.state()), install(t, second, State{})
		if ports, err := Tables(); err != nil || fmt.Sprint(ports) != "[8443 8444]" {
			t.Errorf("tables of ports %v, %v", ports, err)
		}
		if err := two.Delete(); err != nil {
			t.Fatal(err)
		}
		wantState(t, one, f.state())
	})
	if ports, err := Tables(); err != nil || len(ports) != 0 {
		t.Errorf("tables of ports %v, %v", ports, err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil || len(chains) != 1 || chains[0].Table.Name != "filter" {
		t.Errorf("chains %v, %v, want that of the foreign table", chains, err)
	}
}

func TestWatch(t *testing.T) {
	testnetns.Require(t)
	w, err := Watch()
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan error, 1)
	go func() { heard <- w.Wait() }()
	f := families(t)["IPv4"]
	install(t, f.spec(), State{})
	select {
	case err := <-heard:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("a change was not heard of within 5 s")
	}
	ended := make(chan error, 1)
	go func() {
		for w.Wait() == nil { //nolint:revive // what was heard of so far
		}
		ended <- nil
	}()
	_ = w.Close()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("Wait goes on after Close")
	}
}

func listenUDP(t *testing.T, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	lc := net.ListenConfig{Control: freebind}
	c, err := lc.ListenPacket(t.Context(), "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.UDPConn)
}

func freebind(network, _ string, c syscall.RawConn) error {
	var err error
	if strings.HasSuffix(network, "6") {
		_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1) })
	}
	return err
}

func wildcard(f family, port uint16) netip.AddrPort {
	if f.v6 {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
}

func read(t *testing.T, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// A sidecar is its socket for the packets of all peers.
type sidecar struct{ *net.UDPConn }

func listenSidecar(t *testing.T, f family) sidecar {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		level, option := unix.IPPROTO_IP, unix.IP_TRANSPARENT
		if f.v6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
		}
		var err error
		_ = c.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), level, option, 1), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, Mark))
		})
		return err
	}}
	c, err := lc.ListenPacket(t.Context(), map[bool]string{false: "udp4", true: "udp6"}[f.v6], wildcard(f, endpointPort).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return sidecar{c.(*net.UDPConn)}
}

// deliver hands a packet of a peer's to a server of this host.
func (s sidecar) deliver(from netip.Addr, to netip.AddrPort, payload []byte) error {
	control := unix.PktInfo6(&unix.Inet6Pktinfo{Addr: from.As16()})
	if from.Is4() {
		control = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: from.As4()})
	}
	_, _, err := s.WriteMsgUDPAddrPort(payload, control, to)
	return err
}

// A server on all addresses talks to its peer's address, and to the endpoint in
// truth; what comes back is the peer's. Datagrams may be of any size.
func TestPacketsAreTurned(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			server := listenUDP(t, wildcard(f, servicePort))
			endpoint := listenSidecar(t, f)
			install(t, f.spec(), f.state())
			for _, size := range []int{1, 1400, 8 << 10, 60000, 65480, 65487, 65507} {
				if size == 65507 && f.v6 {
					continue
				}
				payload := strings.Repeat("x", size)
				if _, err := server.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(f.bob, servicePort)); err != nil {
					t.Fatal(err)
				}
				got, from := read(t, endpoint.UDPConn)
				if want := netip.AddrPortFrom(f.server, servicePort); got != payload || from != want {
					t.Errorf("the endpoint got %d bytes from %v, want %d from %v", len(got), from, size, want)
				}
				if err := endpoint.deliver(f.bob, netip.AddrPortFrom(f.server, servicePort), []byte(payload)); err != nil {
					t.Fatal(err)
				}
				got, from = read(t, server)
				if want := netip.AddrPortFrom(f.bob, servicePort); got != payload || from != want {
					t.Errorf("the server got %d bytes from %v, want %d from %v", len(got), from, size, want)
				}
			}
		})
	}
}

func TestStreamsAreTurned(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			lc := net.ListenConfig{Control: freebind}
			ln, err := lc.Listen(t.Context(), "tcp", netip.AddrPortFrom(f.endpoint, endpointPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ln.Close() }()
			install(t, f.spec(), f.state())
			done := make(chan error, 1)
			go func() {
				c, err := ln.Accept()
				if err == nil {
					_, err = io.Copy(c, c)
					err = errors.Join(err, c.Close())
				}
				done <- err
			}()
			c := dialTCP(t, f.bob, 0)
			if got := c.RemoteAddr().String(); got != netip.AddrPortFrom(f.bob, servicePort).String() {
				t.Errorf("connected to %s", got)
			}
			sent := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
			go func() {
				_, _ = c.Write(sent)
				_ = c.(*net.TCPConn).CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func dialTCP(t *testing.T, to netip.Addr, mark int) net.Conn {
	t.Helper()
	c, err := tryTCP(t, to, mark)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func tryTCP(t *testing.T, to netip.Addr, mark int) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if mark != 0 {
			_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
		}
		return err
	}}
	return d.DialContext(ctx, "tcp", netip.AddrPortFrom(to, servicePort).String())
}

// sendUDP sends from a connected socket, which is told of errors, and returns
// what it is told.
func sendUDP(t *testing.T, to netip.Addr) error {
	t.Helper()
	c, err := net.Dial("udp", netip.AddrPortFrom(to, servicePort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	_, err = c.Read(make([]byte, 1))
	return err
}

// left is how many packets have gone out on the link.
func left(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	const transmitted = 10 // proc_net_dev(5): the tenth field is of packets sent
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "eth0:" {
			return f[transmitted]
		}
	}
	t.Fatal("no eth0")
	return ""
}

// What is not carried is refused at once, whether the peer is lost or no sidecar
// runs, and nothing of it leaves. What is none of ours leaves as ever.
func TestRefusedIsRefused(t *testing.T) {
	for name, f := range families(t) {
		t.Run(name, func(t *testing.T) {
			install(t, f.spec(), f.state()) // and nobody at the endpoint
			before := left(t)
			for what, to := range map[string]netip.Addr{"a lost peer": f.lost, "a peer while no sidecar runs": f.bob} {
				if err := sendUDP(t, to); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) {
					t.Errorf("a packet to %s: %v, want refused", what, err)
				}
				if _, err := tryTCP(t, to, 0); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a connection to %s: %v, want refused", what, err)
				}
			}
			if after := left(t); after != before {
				t.Errorf("something left: %s before, %s after", before, after)
			}
			if err := sendUDP(t, f.plainly); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("a packet to somebody else: %v, want silence", err)
			}
			if after := left(t); after == before {
				t.Error("a packet to somebody else did not leave")
			}
			before = left(t)
			if _, err := tryTCP(t, f.bob, Mark); errors.Is(err, syscall.ECONNREFUSED) || left(t) == before {
				t.Errorf("a marked connection did not leave: %v", err)
			}
		})
	}
}
