// Package lab builds networks out of network namespaces for end-to-end tests:
// two datacenters on LANs of their own, a gateway host each, one WAN link
// between the gateway hosts, and no other route.
//
//	lab.Require(t)
//	net := lab.TwoSites(t, lab.Options{HostsA: 2, HostsB: 2})
//	net.Sites[0].Hosts[0].Start("serf", ...)
//
// Everything is removed when the test ends, also when it fails or is interrupted;
// what a killed run has left behind is swept at the next start. It needs root, ip(8)
// and nft(8).
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Missing says what this machine lacks for end-to-end tests; "" if nothing.
func Missing() string {
	switch {
	case os.Geteuid() != 0:
		return "network namespaces need root"
	case !inPath("ip"):
		return "ip is not installed (package iproute2)"
	case !inPath("nft"):
		return "nft is not installed (package nftables)"
	}
	return ""
}

func inPath(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

// Require skips a test on a machine that cannot run it, and says why; with
// CULVERT_E2E=require it fails it. Every end-to-end test calls it first: the
// count of tests in the source is the count of its callers.
func Require(t testing.TB) {
	t.Helper()
	ran.Add(1)
	lack := Missing()
	if lack == "" {
		return
	}
	ran.Add(-1)
	skipped.Add(1)
	if os.Getenv("CULVERT_E2E") == "require" {
		t.Fatalf("CULVERT_E2E=require: %s", lack)
	}
	t.Skipf("skipped: %s", lack)
}

//nolint:gochecknoglobals // counts of one test binary
var ran, skipped atomic.Int64

// Counts returns how many tests Require let run and how many it did not.
func Counts() (run, skip int64) { return ran.Load(), skipped.Load() }

// Options say how large a network is.
type Options struct {
	HostsA, HostsB int
	IPv6           bool

	// WAN makes a device wan0 on each of the gateways' hosts, and what is between
	// them; nil: a pair of veth devices.
	WAN func(a, b *Host)
}

// A Network is two sites and the link between them.
type Network struct {
	t     testing.TB
	Sites [2]*Site
	IPv6  bool

	daemons *daemons
}

// A Site is one datacenter.
type Site struct {
	Name    string // dc1, dc2
	Gateway *Host
	WAN     netip.Addr // the gateway's address on the WAN link
	Hosts   []*Host
}

// A Host is one namespace.
type Host struct {
	t    testing.TB
	Name string
	NS   string
	Addr netip.Addr // on its site's LAN
	Dir  string     // for files of what runs here

	daemons *daemons // of the network
}

// prefix begins the names of all namespaces of the lab.
const prefix = "cvlab"

//nolint:gochecknoglobals // namespaces are named apart within one process
var sequence atomic.Int64

// TwoSites builds a network. Hosts have the LAN addresses 10.71.0.11, .12 and
// so on (10.72 in dc2), gateways .1, or the like of fd71:: with IPv6.
func TwoSites(t testing.TB, o Options) *Network {
	t.Helper()
	sweep()
	id := fmt.Sprintf("%s-%d-%d", prefix, os.Getpid(), sequence.Add(1))
	n := &Network{t: t, IPv6: o.IPv6, daemons: new(daemons)}
	dir := t.TempDir()
	removeOnInterrupt(t, dir)
	for i, hosts := range []int{o.HostsA, o.HostsB} {
		site := &Site{Name: fmt.Sprintf("dc%d", i+1), WAN: n.wan(i)}
		site.Gateway = n.host(id, dir, site.Name+"gw", n.lan(i, 1))
		for h := range hosts {
			site.Hosts = append(site.Hosts, n.host(id, dir, fmt.Sprintf("%sh%d", site.Name, h+1), n.lan(i, 11+h)))
		}
		n.Sites[i] = site
	}
	n.wire(o.WAN)
	return n
}

func (n *Network) lan(site, host int) netip.Addr {
	if n.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd7%d::%d", site+1, host))
	}
	return netip.AddrFrom4([4]byte{10, byte(71 + site), 0, byte(host)})
}

func (n *Network) wan(site int) netip.Addr {
	if n.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd79::%d", site+1))
	}
	return netip.AddrFrom4([4]byte{10, 79, 0, byte(site + 1)})
}

func (n *Network) bits() string {
	if n.IPv6 {
		return "/64"
	}
	return "/24"
}

func (n *Network) host(id, dir, name string, addr netip.Addr) *Host {
	h := &Host{t: n.t, Name: name, NS: id + "-" + name, Addr: addr, Dir: filepath.Join(dir, name), daemons: n.daemons}
	if err := os.Mkdir(h.Dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	ip(n.t, "", "netns add "+h.NS)
	n.t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", h.NS).CombinedOutput(); err != nil {
			n.t.Errorf("remove namespace %s: %v %s", h.NS, err, out)
		}
	})
	n.t.Cleanup(h.reap)
	return h
}

// reap ends what is left on the host: servers start processes of their own, some
// of which are meant to outlive them.
func (h *Host) reap() {
	if err := killAll(h.NS); err != nil {
		h.t.Error(err)
	}
}

// wire makes the links and addresses.
func (n *Network) wire(wan func(a, b *Host)) {
	a, b := n.Sites[0].Gateway, n.Sites[1].Gateway
	var links []string
	if wan != nil {
		wan(a, b)
	} else {
		links = append(links, fmt.Sprintf("link add name wan0 netns %s type veth peer name wan0 netns %s", a.NS, b.NS))
	}
	for _, site := range n.Sites {
		gw := site.Gateway
		up := []string{"link set lo up", "link add name br0 type bridge", "link set br0 up"}
		for i, h := range site.Hosts {
			port := fmt.Sprintf("p%d", i+1)
			links = append(links, fmt.Sprintf("link add name eth0 netns %s type veth peer name %s netns %s", h.NS, port, gw.NS))
			up = append(up, "link set "+port+" master br0 up")
		}
		flags := ""
		if n.IPv6 {
			flags = " nodad"
		}
		up = append(up,
			"addr add "+gw.Addr.String()+n.bits()+" dev br0"+flags,
			"addr add "+site.WAN.String()+n.bits()+" dev wan0"+flags, "link set wan0 up")
		defer func() {
			gw.quiet(n.IPv6)
			ip(n.t, gw.NS, up...)
			for _, h := range site.Hosts {
				h.quiet(n.IPv6)
				ip(n.t, h.NS, "link set lo up", "addr add "+h.Addr.String()+n.bits()+" dev eth0"+flags, "link set eth0 up")
			}
		}()
	}
	ip(n.t, "", links...)
}

// quiet keeps the kernel from sending what no test asked for.
func (h *Host) quiet(ipv6 bool) {
	set := map[string]string{"ipv4/ip_forward": "0"}
	if ipv6 {
		set["ipv6/conf/all/accept_ra"], set["ipv6/conf/default/accept_ra"] = "0", "0"
		set["ipv6/conf/default/router_solicitations"] = "0"
		set["ipv6/conf/wan0/router_solicitations"] = "0"
		// While a link-local address is being detected, for a second or two, a
		// router asks for no neighbour and answers for those behind it that
		// there is no route.
		for _, link := range []string{"all", "default", "eth0", "wan0"} {
			set["ipv6/conf/"+link+"/accept_dad"] = "0"
		}
	} else {
		set["ipv6/conf/all/disable_ipv6"], set["ipv6/conf/default/disable_ipv6"] = "1", "1"
	}
	h.set(set)
}

// set sets what the host's kernel has of some settings beneath /proc/sys/net.
func (h *Host) set(values map[string]string) {
	h.t.Helper()
	if err := h.Do(func() error {
		for key, value := range values {
			if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	}); err != nil {
		h.t.Fatalf("set up %s: %v", h.Name, err)
	}
}

// Route connects the sites plainly, through the gateway hosts: what a control
// without Culvert needs.
func (n *Network) Route() {
	n.t.Helper()
	for i, site := range n.Sites {
		other := n.Sites[1-i]
		size := 24
		if n.IPv6 {
			size = 64
		}
		there := netip.PrefixFrom(other.Gateway.Addr, size).Masked().String()
		between := netip.PrefixFrom(site.WAN, size).Masked().String()
		if err := site.Gateway.Do(func() error {
			return errors.Join(
				os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644),
				os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644),
			)
		}); err != nil {
			n.t.Fatal(err)
		}
		ip(n.t, site.Gateway.NS, "route add "+there+" via "+other.WAN.String())
		for _, h := range site.Hosts {
			via := " via " + site.Gateway.Addr.String()
			ip(n.t, h.NS, "route add "+there+via, "route add "+between+via)
		}
	}
}

// DefaultRoutes gives each host a default route to its site's gateway host, as
// hosts have it, and counts there what they send that way for the other site.
// The gateway hosts forward nothing.
func (n *Network) DefaultRoutes() {
	n.t.Helper()
	family := "ip"
	if n.IPv6 {
		family = "ip6"
	}
	for i, site := range n.Sites {
		far := netip.PrefixFrom(n.Sites[1-i].Gateway.Addr, map[bool]int{false: 24, true: 64}[n.IPv6]).Masked()
		nft(n.t, site.Gateway, fmt.Sprintf(`table inet plainly {
  counter sent {}
  chain pre { type filter hook prerouting priority -400; %s daddr %s counter name sent; }
}
`, family, far))
		for _, h := range site.Hosts {
			ip(n.t, h.NS, "route add default via "+site.Gateway.Addr.String())
		}
	}
}

// SentPlainly is how many packets the hosts have sent for the other site by
// their default routes.
func (n *Network) SentPlainly() int {
	n.t.Helper()
	sent := 0
	for _, site := range n.Sites {
		sent += counters(n.t, site.Gateway, "plainly")["sent"]
	}
	return sent
}

// Hosts returns the hosts of both sites, gateways aside.
func (n *Network) Hosts() []*Host {
	return append(append([]*Host{}, n.Sites[0].Hosts...), n.Sites[1].Hosts...)
}

// MakeLocal makes an IPv6 prefix local to the host (AnyIP).
func (h *Host) MakeLocal(prefix string) {
	h.t.Helper()
	ip(h.t, h.NS, "-6 route add local "+prefix+" dev lo")
}

// ip runs commands of ip(8), in a namespace if one is given.
func ip(t testing.TB, ns string, commands ...string) {
	t.Helper()
	var args []string
	if ns != "" {
		args = append(args, "-n", ns)
	}
	for i, c := range commands {
		commands[i] = strings.TrimPrefix(c, "-6 ")
		if commands[i] != c {
			args = append(args, "-6")
		}
	}
	cmd := exec.Command("ip", append(args, "-batch", "-")...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s\n%s", ns, err, strings.Join(commands, "\n"), out)
	}
}

// Do runs f on a thread inside the host's namespace. Sockets that f opens stay
// there.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	go onSpareThread(func() {
		// Runs also where f ends its goroutine, as t.Fatal does.
		defer close(done)
		done <- h.enter(f)
	})
	err, returned := <-done
	if !returned {
		return fmt.Errorf("in %s: ended without returning", h.NS)
	}
	return err
}

// onSpareThread runs f on a thread that ends with it. Never on the main one:
// that cannot end (the runtime parks it), would hold the namespace for as long
// as the process lives, and is what /proc/self and `ip netns pids` go by.
func onSpareThread(f func()) {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	defer runtime.UnlockOSThread()
	var other sync.WaitGroup
	other.Go(func() { onSpareThread(f) }) // elsewhere, as this one is taken
	other.Wait()
}

// enter puts the calling thread into the host's namespace and runs f.
func (h *Host) enter(f func() error) error {
	ns, err := os.Open("/var/run/netns/" + h.NS)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", h.NS, err)
	}
	return f()
}

// in returns what f makes inside the host's namespace.
func in[T any](h *Host, f func() (T, error)) (T, error) {
	var v T
	err := h.Do(func() (err error) {
		v, err = f()
		return err
	})
	return v, err
}

// Dial connects from the host.
func (h *Host) Dial(network, address string) (net.Conn, error) {
	return in(h, func() (net.Conn, error) { return net.DialTimeout(network, address, 5*time.Second) })
}

// Listen listens for TCP connections on the host.
func (h *Host) Listen(address string) (net.Listener, error) {
	return in(h, func() (net.Listener, error) { return net.Listen("tcp", address) })
}

// ListenPacket opens a UDP socket on the host.
func (h *Host) ListenPacket(address string) (*net.UDPConn, error) {
	return in(h, func() (*net.UDPConn, error) {
		a, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return nil, err
		}
		return net.ListenUDP("udp", a)
	})
}

// HTTP is a client that connects from the host.
func (h *Host) HTTP() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext:       func(_ context.Context, network, address string) (net.Conn, error) { return h.Dial(network, address) },
		DisableKeepAlives: true,
	}}
}
