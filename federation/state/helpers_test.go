package state

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// start is when the tests' clocks begin.
func start() time.Time { return time.Date(2026, 11, 22, 22, 0, 0, 0, time.UTC) }

func srv(dc, node, advertise string) *Registration {
	return &Registration{Datacenter: dc, Server: &Server{
		Node: node, Advertise: netip.MustParseAddr(advertise), Address: "10.0.0.1:8443", Version: "0.1.0", Health: Passing,
		Services: []Service{{"gossip-packet", "packet", 8302}, {"rpc", "stream", 8300}},
		Process:  Process{Start: "s1"},
	}}
}

func gw(dc, name, wan string) *Registration {
	return &Registration{Datacenter: dc, Gateway: &Gateway{
		Name: name, Address: "10.0.0.9:8443", WANAddress: wan, Version: "0.1.0", Health: Passing, Process: Process{Start: "s1"},
	}}
}

// with is reg by another process.
func with(reg *Registration, p Process) *Registration {
	c := *reg
	if c.Server != nil {
		s := *c.Server
		s.Process = p
		c.Server = &s
	} else {
		g := *c.Gateway
		g.Process = p
		c.Gateway = &g
	}
	return &c
}

// do applies commands, a second apart, and fails where one is refused.
func do(t testing.TB, s *State, cs ...Command) *State {
	t.Helper()
	for _, c := range cs {
		if c.At.IsZero() {
			c.At = start()
		}
		next, err := s.Apply(s.Index()+1, c)
		if err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		s = next
	}
	return s
}

func register(reg *Registration) Command { return Command{Register: reg} }

// A script makes random commands that mostly make sense, on few names and
// addresses, so that they meet.
type script struct {
	*rand.Rand
	now time.Time
}

func newScript(seed uint64) *script {
	return &script{rand.New(rand.NewPCG(seed, 1)), start()}
}

func (r *script) next() Command {
	r.now = r.now.Add(time.Duration(r.IntN(60)) * time.Second)
	c := Command{At: r.now}
	switch n := r.IntN(20); {
	case n < 10:
		reg := srv(r.dc(), fmt.Sprintf("n%d", r.IntN(4)), fmt.Sprintf("127.77.0.%d", 1+r.IntN(12)))
		reg.Server.Version = fmt.Sprintf("0.%d.0", r.IntN(3))
		c.Register = with(reg, Process{Start: fmt.Sprintf("s%d", r.IntN(3)), Instance: fmt.Sprintf("i%d", r.IntN(2))})
	case n < 13:
		c.Register = with(gw(r.dc(), fmt.Sprintf("gw%d", r.IntN(2)), "203.0.113.1:8443"), Process{Start: fmt.Sprintf("s%d", r.IntN(3))})
	case n < 16:
		c.Critical = r.keys()
	default:
		c.Remove = &Removal{Keys: r.keys(), Left: r.IntN(2) == 0}
		if r.IntN(3) == 0 {
			c.Remove.Before = r.now.Add(-time.Minute)
		}
	}
	return c
}

func (r *script) dc() string { return fmt.Sprintf("dc%d", r.IntN(5)) }

func (r *script) keys() []Key {
	var out []Key
	for range r.IntN(5) {
		if r.IntN(3) == 0 {
			out = append(out, Key{r.dc(), KindGateway, fmt.Sprintf("gw%d", r.IntN(2))})
		} else {
			out = append(out, Key{r.dc(), KindServer, fmt.Sprintf("n%d", r.IntN(4))})
		}
	}
	return out
}

// logged is a command as it comes out of the log.
func logged(t testing.TB, c Command) Command {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var out Command
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func dumped(t testing.TB, s *State) string {
	t.Helper()
	b, err := s.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
