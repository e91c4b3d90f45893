package federation

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"culvert/federation/state"
)

// Of two that claim an address, the own datacenter's has it, and then who had it
// before: whoever comes later does not take it, whatever its name.
func TestWhoHasAnAddress(t *testing.T) {
	const a = "10.5.0.1"
	bob, carol, zoe := server("dc2", "bob", a), server("dc3", "carol", a), server("dc1", "zoe", a)
	r := reader()
	for _, step := range []struct {
		entries []*state.Registration
		peers   string
		refused string
	}{
		{[]*state.Registration{carol}, "dc3/carol@" + a, ""},
		{[]*state.Registration{bob, carol}, "dc3/carol@" + a, "dc2/bob: its address 10.5.0.1 is dc3/carol's"},
		{[]*state.Registration{zoe, bob, carol}, "dc3/carol@" + a, "dc1/zoe: its address 10.5.0.1 is dc3/carol's\ndc2/bob: its address 10.5.0.1 is dc3/carol's"},
		{[]*state.Registration{bob, server("dc3", "carol", "10.5.0.2")}, "dc2/bob@" + a + " dc3/carol@10.5.0.2", ""}, // it has another one
		{[]*state.Registration{bob, carol}, "dc2/bob@" + a, "dc3/carol: its address 10.5.0.1 is dc2/bob's"},
		{[]*state.Registration{carol}, "dc3/carol@" + a, ""}, // bob has gone
		{[]*state.Registration{carol, server("dc4", "carol", a)}, "dc3/carol@" + a, "dc4/carol: its address 10.5.0.1 is dc3/carol's"},
		{nil, "", ""},
		{[]*state.Registration{zoe, bob, carol}, "dc1/zoe@" + a, "dc2/bob: its address 10.5.0.1 is dc1/zoe's\ndc3/carol: its address 10.5.0.1 is dc1/zoe's"},
	} {
		v := view(t, r, records(t, step.entries...))
		if peers(v) != step.peers || refusals(v) != step.refused {
			t.Errorf("with %d entries: %s, and %q; want %s, and %q", len(step.entries), peers(v), refusals(v), step.peers, step.refused)
		}
	}
}

// What the configuration says of a server counts, and the rest of the entry is
// taken all the same.
func TestConfigurationWins(t *testing.T) {
	s := records(t, server("dc1", "amy", "10.71.0.99"), server("dc2", "bob", "10.71.0.12"), server("dc3", "carol", "10.71.0.99"))
	r := reader(claiming("dc1", "amy", "10.71.0.12"), accepting("dc1", "10.9.0.0/16", ""))
	for range 2 {
		v := view(t, r, s)
		if got := peers(v); got != "dc1/amy@10.71.0.12 dc3/carol@10.71.0.99" || v.Peers[0].Address != "10.71.0.11:8443" {
			t.Errorf("peers are %s", got)
		}
		want := "dc1/amy: its address 10.71.0.99 is not taken: the configuration says 10.71.0.12\ndc2/bob: its address 10.71.0.12 is dc1/amy's"
		if got := refusals(v); got != want {
			t.Errorf("refused: %s", got)
		}
	}
}

// Whatever records say, no view holds a forbidden address, two peers of one
// address, or the reader itself; nothing is refused twice, and nothing vanishes
// without a word.
func TestViewProperty(t *testing.T) {
	advertise := []string{
		"10.71.0.11", "10.2.0.1", "10.2.0.2", "10.3.0.1", "127.0.0.1", "127.77.1.1", "127.77.2.1", "127.0.0.9", "127.255.255.255", "169.254.1.1",
		"192.168.7.1", "10.99.0.1", "::1", "fe80::2", "fd00:71::11", "fd00:72::1", "255.255.255.255", "10.4.0.1", "240.0.0.1",
	}
	wan := []string{
		"127.0.0.1:1", "10.71.0.11:2", "10.71.9.9:3", "203.0.113.1:4", "[::1]:5", "[fe80::1]:6", "gw.example:7", "10.4.0.9:8", "[::ffff:10.71.0.11]:9",
		"224.0.0.1:10", "198.51.100.1:11",
	}
	services := [][]state.Service{gossip(), gossip(), gossip(), {{Name: "gossip-packet", Kind: "packet", Port: 1}}, {{Name: "rpc", Kind: "stream", Port: 7946}}}
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		options := []func(o *ReaderOptions){accepting("dc4", "10.4.0.0/16", "10.4.0.0/16"), claiming("dc2", "n1", "10.2.0.2")}
		bind := seed%2 == 0
		if bind {
			options = append(options, virtually)
		}
		r := reader(options...)
		for range 4 {
			var entries []*state.Registration
			for dc := range 5 {
				for node := range rnd.IntN(4) {
					e := with(server(fmt.Sprintf("dc%d", dc+1), fmt.Sprintf("n%d", node), advertise[rnd.IntN(len(advertise))]), services[rnd.IntN(len(services))]...)
					if e.Datacenter == "dc1" && node == 0 {
						e.Server.Node = "alice"
					}
					entries = append(entries, e)
				}
				for g := range rnd.IntN(3) {
					entries = append(entries, gateway(fmt.Sprintf("dc%d", dc+1), fmt.Sprintf("g%d", g), wan[rnd.IntN(len(wan))]))
				}
			}
			s := looseRecords(t, entries...)
			v := view(t, r, s)
			checkView(t, bind, s, v)
			if t.Failed() {
				t.Fatalf("seed %d: peers %s\nrefused %s", seed, peers(v), refusals(v))
			}
		}
	}
}

// looseRecords are records among which, as nowhere else, two servers of one
// datacenter may have one address: a primary could be wrong.
func looseRecords(t *testing.T, entries ...*state.Registration) *state.State {
	t.Helper()
	s := state.New()
	for _, e := range entries {
		one := records(t, e)
		if r := s.Record(e.Datacenter); r != nil {
			one = one.Over(s)
		}
		next, err := s.With("S", s.Index()+1, one.All(), false)
		if err != nil {
			t.Fatal(err)
		}
		s = next
	}
	return s
}

func checkView(t *testing.T, bind bool, s *state.State, v View) {
	t.Helper()
	seen := make(map[netip.Addr]string)
	outcome := make(map[state.Key]int) // of each entry
	for i, p := range v.Peers {
		k := state.Key{Datacenter: p.Datacenter, Kind: state.KindServer, Name: p.Node}
		outcome[k]++
		if other := seen[p.Advertise]; other != "" {
			t.Errorf("%s and %s have one address", other, k)
		}
		seen[p.Advertise] = k.String()
		if i > 0 && (p.Datacenter+"/"+p.Node) <= v.Peers[i-1].Datacenter+"/"+v.Peers[i-1].Node {
			t.Errorf("%s is out of order", k)
		}
		claimed := k.String() == "dc2/n1"
		virtual := bind && p.Advertise.Is4() && p.Advertise.IsLoopback() && p.Advertise.String() != "127.255.255.255" && p.Advertise.String()[:8] != "127.0.0."
		own, _ := netip.ParsePrefix("10.4.0.0/16")
		switch sv, _ := s.Record(p.Datacenter).Server(p.Node); {
		case p.Datacenter == "dc1" && p.Node == "alice":
			t.Error("the reader is its own peer")
		case !p.Advertise.IsGlobalUnicast() && !virtual, p.Advertise == netip.MustParseAddr("10.71.0.11"),
			p.Advertise == netip.MustParseAddr("192.168.7.1"), p.Advertise == netip.MustParseAddr("fd00:71::11"),
			p.Advertise == netip.MustParseAddr("10.99.0.1") && !bind, p.Advertise == netip.MustParseAddr("127.77.1.1"),
			own.Contains(p.Advertise) != (p.Datacenter == "dc4"), claimed != (p.Advertise == netip.MustParseAddr("10.2.0.2")):
			t.Errorf("%s has %s", k, p.Advertise)
		case sv.Services[0] != gossip()[0]:
			t.Errorf("%s has the services %v", k, sv.Services)
		}
	}
	checkGateways(t, v)
	for _, r := range v.Refused {
		outcome[r.Key]++
		if r.Why == "" {
			t.Errorf("%s is refused without a word", r.Key)
		}
	}
	for _, r := range s.Records() {
		for _, sv := range r.Servers {
			k := state.Key{Datacenter: r.Datacenter, Kind: state.KindServer, Name: sv.Node}
			self := k.String() == "dc1/alice"
			moved := k.String() == "dc2/n1" && sv.Advertise.String() != "10.2.0.2" // taken, and its address told of
			if n := outcome[k]; self && n != 0 || !self && n != 1 && (!moved || n != 2) {
				t.Errorf("%s comes up %d times", k, n)
			}
		}
		for _, g := range r.Gateways {
			k := state.Key{Datacenter: r.Datacenter, Kind: state.KindGateway, Name: g.Name}
			if n := outcome[k]; n > 1 {
				t.Errorf("%s is refused %d times", k, n)
			}
		}
	}
}

func checkGateways(t *testing.T, v View) {
	t.Helper()
	for dc, all := range v.Datacenters {
		for _, g := range all {
			switch fine := g == "203.0.113.1:4" || g == "gw.example:7" || g == "198.51.100.1:11" || g == "10.4.0.9:8"; {
			case dc == "dc1", !fine, dc == "dc4" && g != "10.4.0.9:8":
				t.Errorf("%s is reached at %s", dc, g)
			}
		}
	}
}
