package federation

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"culvert/federation/state"
)

// thisHost has an address on its LAN, another one elsewhere, and one on its
// loopback interface.
func thisHost() ([]LocalAddr, error) {
	return []LocalAddr{
		{netip.MustParsePrefix("127.0.0.1/8"), true},
		{netip.MustParsePrefix("10.99.0.1/32"), true},
		{netip.MustParsePrefix("10.71.0.11/16"), false},
		{netip.MustParsePrefix("192.168.7.1/24"), false},
		{netip.MustParsePrefix("fd00:71::11/64"), false},
	}, nil
}

// reader is alice of dc1, with `redirect` unless options say otherwise.
func reader(change ...func(o *ReaderOptions)) *Reader {
	o := ReaderOptions{
		Datacenter: "dc1", Node: "alice", Services: gossip(), Advertise: netip.MustParseAddr("10.71.0.11"),
		LAN: netip.MustParseAddr("10.71.0.11"), Local: thisHost,
	}
	for _, f := range change {
		f(&o)
	}
	return NewReader(o)
}

func virtually(o *ReaderOptions) {
	o.Virtual, o.Advertise = true, netip.MustParseAddr("127.77.1.1")
}

func accepting(dc, advertise, gateways string) func(o *ReaderOptions) {
	return func(o *ReaderOptions) {
		a := Accept{Datacenter: dc}
		for p := range strings.FieldsSeq(advertise) {
			a.Advertise = append(a.Advertise, netip.MustParsePrefix(p))
		}
		for p := range strings.FieldsSeq(gateways) {
			a.Gateways = append(a.Gateways, netip.MustParsePrefix(p))
		}
		o.Accept = append(o.Accept, a)
	}
}

func claiming(dc, node, advertise string) func(o *ReaderOptions) {
	return func(o *ReaderOptions) {
		o.Claims = append(o.Claims, Claim{dc, node, netip.MustParseAddr(advertise)})
	}
}

// records are those that a reader has from the primary, as they are in JSON.
func records(t testing.TB, entries ...*state.Registration) *state.State {
	t.Helper()
	s := state.New()
	by := make(map[string]*state.State)
	for i, r := range entries { // each datacenter by itself: the store would refuse what is claimed twice
		one := by[r.Datacenter]
		if one == nil {
			one = stateOf(t, "S")
		}
		by[r.Datacenter] = apply(t, one, state.Command{Register: r})
		next, err := s.With("S", uint64(i)+1, by[r.Datacenter].All(), false)
		if err != nil {
			t.Fatal(err)
		}
		s = next
	}
	return s
}

func view(t testing.TB, r *Reader, s *state.State) View {
	t.Helper()
	v, err := r.View(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// peers are those of a view, with their addresses.
func peers(v View) string {
	var out []string
	for _, p := range v.Peers {
		text := p.Datacenter + "/" + p.Node + "@" + p.Advertise.String()
		if p.Critical {
			text += "!"
		}
		out = append(out, text)
	}
	return strings.Join(out, " ")
}

func refusals(v View) string {
	var out []string
	for _, r := range v.Refused {
		out = append(out, r.String())
	}
	return strings.Join(out, "\n")
}

// with returns an entry whose services are others.
func with(r *state.Registration, services ...state.Service) *state.Registration {
	r.Server.Services = services
	return r
}

// A claim of a server's, and what becomes of it.
type serverCase struct {
	name      string
	advertise string
	why       string // "" if it is taken
	options   []func(o *ReaderOptions)
}

func serverCases() []serverCase {
	const in, is = "", "dc2/bob: its address "
	return []serverCase{
		{"another host's", "10.2.0.1", in, nil},
		{"another host's, IPv6", "fd00:72::1", in, nil},
		{"inside the own LAN", "10.71.0.99", in, nil}, // where a server is, its own host may be: accept bounds that
		{"the reader's own", "10.71.0.11", is + "10.71.0.11 is that of this sidecar's own server", nil},
		{"the reader's own virtual one", "127.77.1.1", is + "127.77.1.1 is that of this sidecar's own server", []func(o *ReaderOptions){virtually}},
		{"the reader's sidecar", "10.71.0.12", is + "10.71.0.12 is this sidecar's own", []func(o *ReaderOptions){func(o *ReaderOptions) {
			o.LAN = netip.MustParseAddr("10.71.0.12")
		}}},
		{"this host's", "192.168.7.1", is + "192.168.7.1 is this host's own", nil},
		{"this host's, IPv6", "fd00:71::11", is + "fd00:71::11 is this host's own", nil},
		{"this host's, on lo", "10.99.0.1", is + "10.99.0.1 is this host's own", nil},
		{"virtual, on lo", "10.99.0.1", in, []func(o *ReaderOptions){virtually}},
		{"this host's, with bind", "192.168.7.1", is + "192.168.7.1 is this host's own", []func(o *ReaderOptions){virtually}},
		{"loopback", "127.0.0.1", is + "127.0.0.1 is a loopback address", nil},
		{"loopback, redirect", "127.77.2.1", is + "127.77.2.1 is a loopback address", nil},
		{"loopback, IPv6", "::1", is + "::1 is a loopback address", []func(o *ReaderOptions){virtually}},
		{"virtual", "127.77.2.1", in, []func(o *ReaderOptions){virtually}},
		{"the first virtual one", "127.0.1.0", in, []func(o *ReaderOptions){virtually}},
		{"the last that is not", "127.0.0.255", is + "127.0.0.255 is a loopback address", []func(o *ReaderOptions){virtually}},
		{"loopback, bind", "127.0.0.1", is + "127.0.0.1 is a loopback address", []func(o *ReaderOptions){virtually}},
		{"lo's broadcast", "127.255.255.255", is + "127.255.255.255 is a loopback address", []func(o *ReaderOptions){virtually}},
		{"link-local", "169.254.169.254", is + "169.254.169.254 is a link-local address", nil},
		{"link-local, IPv6", "fe80::1", is + "fe80::1 is a link-local address", []func(o *ReaderOptions){virtually}},
		{"broadcast", "255.255.255.255", is + "255.255.255.255 is no address of a server", nil},
		{"inside accept", "10.2.0.1", in, []func(o *ReaderOptions){accepting("dc2", "10.3.0.0/16 10.2.0.0/16", "")}},
		{"outside accept", "10.4.0.1", is + `10.4.0.1 is outside what accept "dc2" allows`, []func(o *ReaderOptions){accepting("dc2", "10.2.0.0/16", "")}},
		{"in another's accept", "10.3.0.1", is + `10.3.0.1 is in the range of dc3, by accept "dc3"`, []func(o *ReaderOptions){accepting("dc3", "10.3.0.0/16", "")}},
		{"in the own datacenter's accept", "10.71.5.1", is + `10.71.5.1 is in the range of dc1, by accept "dc1"`, []func(o *ReaderOptions){accepting("dc1", "10.71.0.0/16", "")}},
		{"accept of gateways alone", "10.3.0.1", in, []func(o *ReaderOptions){accepting("dc2", "", "203.0.113.0/24"), accepting("dc3", "", "10.3.0.0/16")}},
		{"accept allows no loopback", "127.77.2.1", is + "127.77.2.1 is a loopback address", []func(o *ReaderOptions){accepting("dc2", "127.77.0.0/16", "")}},
		{"claimed by the configuration", "10.2.0.1", is + "10.2.0.1 is dc3/carol's", []func(o *ReaderOptions){claiming("dc3", "carol", "10.2.0.1")}},
		{"claimed for itself", "10.2.0.1", in, []func(o *ReaderOptions){claiming("dc2", "bob", "10.2.0.1")}},
	}
}

// What a server's entry may make a reader capture.
func TestServersKeptOut(t *testing.T) {
	for _, c := range serverCases() {
		t.Run(c.name, func(t *testing.T) {
			v := view(t, reader(c.options...), records(t, server("dc2", "bob", c.advertise)))
			if got := refusals(v); got != c.why || len(v.Peers) != 0 && c.why != "" {
				t.Errorf("%q, peers %s, want %q", got, peers(v), c.why)
			}
			if want := "dc2/bob@" + c.advertise; c.why == "" && peers(v) != want {
				t.Errorf("peers are %s, want %s", peers(v), want)
			}
		})
	}
}

// One service has one port in the whole federation.
func TestServicesKeptOut(t *testing.T) {
	rpc := state.Service{Name: "rpc", Kind: "stream", Port: 8300}
	moved := gossip()[0]
	moved.Port++
	other := gossip()[0]
	other.Kind = "stream"
	for _, c := range []struct {
		why      string
		services []state.Service
	}{
		{"", []state.Service{rpc, gossip()[0]}},
		{"dc2/bob: its service gossip-packet is packet on port 7947, and here it is packet on port 7946", []state.Service{moved}},
		{"dc2/bob: its service gossip-packet is stream on port 7946, and here it is packet on port 7946", []state.Service{rpc, other}},
		{"dc2/bob: it has no service in common with this sidecar, which has gossip-packet", []state.Service{rpc}},
	} {
		v := view(t, reader(), records(t, with(server("dc2", "bob", "10.2.0.1"), c.services...)))
		if got := refusals(v); got != c.why || (len(v.Peers) == 1) != (c.why == "") {
			t.Errorf("%v: %q, peers %s", c.services, got, peers(v))
		}
	}
}

// What another datacenter's gateway may make a reader dial.
func TestGatewaysKeptOut(t *testing.T) {
	const lan = `is inside this datacenter's own network, 10.71.0.0/16, and no accept block has it among its gateways`
	for _, c := range []struct {
		wan, why string
		options  []func(o *ReaderOptions)
	}{
		{"203.0.113.7:8443", "", nil},
		{"[2001:db8::7]:443", "", nil},
		{"gw.dc2.example:8443", "", nil},
		{"GW.dc2.example:8443", "", nil},
		{"localhost:8443", "", nil}, // names are judged by what they stand for
		{"192.168.7.9:8443", "", nil},
		{"127.0.0.1:8443", "is no address that another datacenter can have", nil},
		{"127.77.2.1:8443", "is no address that another datacenter can have", []func(o *ReaderOptions){virtually}},
		{"[::1]:8443", "is no address that another datacenter can have", nil},
		{"[::ffff:127.0.0.1]:8443", "is no address that another datacenter can have", nil},
		{"169.254.169.254:80", "is no address that another datacenter can have", nil},
		{"[fe80::1]:80", "is no address that another datacenter can have", nil},
		{"224.0.0.1:80", "is no address that another datacenter can have", nil},
		{"0.0.0.0:80", "is no address that another datacenter can have", nil},
		{"[::]:80", "is no address that another datacenter can have", nil},
		{"255.255.255.255:80", "is no address that another datacenter can have", nil},
		{"10.71.0.11:22", "is this host's own", nil},
		{"192.168.7.1:22", "is this host's own", nil},
		{"10.99.0.1:22", "is this host's own", nil},
		{"10.71.0.11:22", "is this host's own", []func(o *ReaderOptions){accepting("dc2", "", "10.71.0.0/16")}},
		{"10.71.3.4:22", lan, nil},
		{"[::ffff:10.71.3.4]:22", lan, nil},
		{"10.71.3.4:22", "", []func(o *ReaderOptions){func(o *ReaderOptions) { o.LAN = netip.Addr{} }}},
		{"10.71.3.4:22", "", []func(o *ReaderOptions){accepting("dc2", "", "10.71.3.0/24")}},
		{"10.71.3.4:22", lan, []func(o *ReaderOptions){accepting("dc3", "", "10.71.3.0/24")}}, // that is for dc3
		{"10.71.3.4:22", lan, []func(o *ReaderOptions){accepting("dc2", "10.71.0.0/16", "")}}, // that is for servers
		{"203.0.113.7:8443", "", []func(o *ReaderOptions){accepting("dc2", "", "203.0.113.0/24")}},
		{"[::ffff:203.0.113.7]:8443", "", []func(o *ReaderOptions){accepting("dc2", "", "203.0.113.0/24")}},
		{"198.51.100.1:8443", `is outside what accept "dc2" allows`, []func(o *ReaderOptions){accepting("dc2", "", "203.0.113.0/24")}},
		{"198.51.100.1:8443", "", []func(o *ReaderOptions){accepting("dc3", "", "203.0.113.0/24")}},
		{"gw.dc2.example:1", `is a name, and accept "dc2" allows addresses: what it stands for then cannot be held against them`, []func(o *ReaderOptions){accepting("dc2", "", "203.0.113.0/24")}},
	} {
		v := view(t, reader(c.options...), records(t, gateway("dc2", "gw2", c.wan)))
		want := ""
		if c.why != "" {
			want = "gateway dc2/gw2: its wan_address " + c.wan + " " + c.why
		}
		if got := refusals(v); got != want {
			t.Errorf("%s: %q, want %q", c.wan, got, want)
		}
		if all, ok := v.Datacenters["dc2"]; !ok || all == nil || (len(all) == 1) != (want == "") {
			t.Errorf("%s: gateways are %v", c.wan, all)
		}
	}
}

// What a name turns out to stand for is judged when it is dialled.
func TestForbid(t *testing.T) {
	r := reader(accepting("dc2", "", "10.71.3.0/24"))
	for to, want := range map[string]string{
		"203.0.113.7:8443":         "",
		"[2001:db8::7]:443":        "",
		"10.71.3.4:8443":           "",
		"127.0.0.1:1":              "127.0.0.1 is no address that another datacenter can have",
		"[::ffff:127.0.0.1]:1":     "::ffff:127.0.0.1 is no address that another datacenter can have",
		"[::1]:1":                  "::1 is no address that another datacenter can have",
		"169.254.169.254:80":       "169.254.169.254 is no address that another datacenter can have",
		"[fe80::1%eth0]:80":        "fe80::1%eth0 is no address that another datacenter can have",
		"0.0.0.0:80":               "0.0.0.0 is no address that another datacenter can have",
		"10.71.0.11:8443":          "10.71.0.11 is this host's own",
		"[::ffff:10.71.0.11]:8443": "::ffff:10.71.0.11 is this host's own",
		"[fd00:71::11%eth0]:8443":  "fd00:71::11%eth0 is this host's own",
		"10.71.4.4:8443":           "10.71.4.4 is inside this datacenter's own network, 10.71.0.0/16, and no accept block has it among its gateways",
	} {
		if err := r.Forbid(netip.MustParseAddrPort(to)); (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("%s: %v, want %q", to, err, want)
		}
	}
}

func TestHostDoesNotTell(t *testing.T) {
	r := reader(func(o *ReaderOptions) {
		o.Local = func() ([]LocalAddr, error) { return nil, errors.New("no netlink") }
	})
	if _, err := r.View(records(t, bob())); err == nil || err.Error() != "ask for this host's addresses: no netlink" {
		t.Error(err)
	}
	if err := r.Forbid(netip.MustParseAddrPort("203.0.113.7:1")); err == nil {
		t.Error("nothing is known of the host, and the address is not forbidden")
	}
}

// The kernel's own answer has loopback in it, as such.
func TestHostAddrs(t *testing.T) {
	h := &hostAddrs{}
	all, err := h.get()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, a := range all {
		found = found || a.Addr().IsLoopback() && a.Loopback && a.IsValid()
	}
	again, _ := h.get()
	if !found || !reflect.DeepEqual(all, again) {
		t.Errorf("this host has %v", all)
	}
}

// A view of everything: self left out, siblings, critical ones, gateways of the own
// and of other datacenters.
func TestView(t *testing.T) {
	s := records(t,
		server("dc1", "alice", "10.71.0.11"), server("dc1", "amy", "10.71.0.12"), gateway("dc1", "gw1", "203.0.113.1:8443"),
		server("dc2", "bob", "10.2.0.1"), gateway("dc2", "gw2", "203.0.113.2:8443"), gateway("dc2", "gw3", "203.0.113.2:8443"),
		gateway("dc2", "gw4", "127.0.0.1:1"), server("dc3", "alice", "10.3.0.1"),
	)
	s = apply(t, s, state.Command{Critical: []state.Key{bob().Key()}})
	r := reader()
	for range 2 {
		v := view(t, r, s)
		if got := peers(v); got != "dc1/amy@10.71.0.12 dc2/bob@10.2.0.1! dc3/alice@10.3.0.1" {
			t.Errorf("peers are %s", got)
		}
		if v.Peers[0].Address != "10.71.0.11:8443" {
			t.Errorf("%+v", v.Peers[0])
		}
		if got := fmt.Sprint(v.Gateways, v.Datacenters); got != "[10.71.0.1:8443] map[dc2:[203.0.113.2:8443] dc3:[]]" {
			t.Errorf("gateways are %s", got)
		}
		if len(v.Refused) != 1 || v.Refused[0].Key != (state.Key{Datacenter: "dc2", Kind: state.KindGateway, Name: "gw4"}) {
			t.Errorf("refused: %s", refusals(v))
		}
	}
	gw := NewReader(ReaderOptions{Datacenter: "dc1", LAN: netip.MustParseAddr("10.71.0.1"), Local: thisHost})
	if got := peers(view(t, gw, s)); got != "dc1/alice@10.71.0.11 dc1/amy@10.71.0.12 dc2/bob@10.2.0.1! dc3/alice@10.3.0.1" {
		t.Errorf("a gateway knows %s", got)
	}
}

// The sidecars of siblings are dialled as they say.
func TestSiblingAddress(t *testing.T) {
	for address, why := range map[string]string{
		"10.71.0.12:8443": "", "amy.dc1.example:8443": "", "127.0.0.1:8443": "",
		"0.0.0.0:8443":          "dc1/amy: its sidecar's address 0.0.0.0 is none that can be dialled",
		"[::ffff:0.0.0.0]:8443": "dc1/amy: its sidecar's address 0.0.0.0 is none that can be dialled",
		"224.0.0.1:8443":        "dc1/amy: its sidecar's address 224.0.0.1 is none that can be dialled",
		"169.254.0.1:8443":      "dc1/amy: its sidecar's address 169.254.0.1 is none that can be dialled",
	} {
		amy := server("dc1", "amy", "10.71.0.12")
		amy.Server.Address = address
		if got := refusals(view(t, reader(), records(t, amy))); got != why {
			t.Errorf("%s: %q, want %q", address, got, why)
		}
	}
}
