package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestRegister(t *testing.T) {
	s := do(t, New(), Command{Found: "one"}, register(srv("dc1", "b", "127.77.1.2")), register(srv("dc1", "a", "127.77.1.1")), register(gw("dc1", "g", "gw.example:8443")))
	if s.Store() != "one" || s.Len() != 1 || s.Index() != 4 {
		t.Fatalf("store %s has %d records at %d", s.Store(), s.Len(), s.Index())
	}
	r := s.Record("dc1")
	if len(r.Servers) != 2 || r.Servers[0].Node != "a" || r.Index != 4 || !r.UpdatedAt.Equal(start()) || len(r.Gateways) != 1 {
		t.Errorf("record is %+v", r)
	}
	if s.Record("dc2") != nil || s.Raw("dc2") != nil {
		t.Error("there is a record of dc2")
	}
	var decoded Record
	if err := json.Unmarshal(s.Raw("dc1"), &decoded); err != nil || decoded.Check() != nil || !strings.Contains(string(s.Raw("dc1")), `"health":"passing"`) {
		t.Errorf("%s: %v", s.Raw("dc1"), err)
	}
	// What changes nothing returns the very same state.
	again := srv("dc1", "b", "127.77.1.2")
	again.Server.Services[0], again.Server.Services[1] = again.Server.Services[1], again.Server.Services[0]
	for _, c := range []Command{
		register(again),
		{Found: "two"},
		{},
		{Remove: &Removal{}},
		{Critical: []Key{{"dc9", KindServer, "x"}}},
		{Remove: &Removal{Keys: []Key{{"dc1", KindGateway, "x"}}, Left: true}},
	} {
		if next := do(t, s, c); next != s {
			t.Errorf("%+v has changed something", c)
		}
	}
	if err := s.Admit(again, start()); err != nil {
		t.Error(err)
	}
}

func TestCriticalAndBack(t *testing.T) {
	reg, g := srv("dc1", "a", "127.77.1.1"), gw("dc1", "g", "gw.example:8443")
	s := do(t, New(), register(reg), register(g))
	later := start().Add(time.Minute + 300*time.Millisecond)
	s = do(t, s, Command{At: later, Critical: []Key{reg.Key(), g.Key()}})
	sv, _ := s.Record("dc1").Server("a")
	one, _ := s.Record("dc1").Gateway("g")
	if sv.Health != Critical || !sv.Since.Equal(later.Truncate(time.Second)) || one.Health != Critical {
		t.Fatalf("server %+v, gateway %+v", sv, one)
	}
	if s.Has(reg) || s.Has(g) {
		t.Error("critical entries count as there")
	}
	if do(t, s, Command{At: later.Add(time.Hour), Critical: []Key{reg.Key()}}) != s {
		t.Error("it is marked twice")
	}
	back := later.Add(time.Minute)
	s = do(t, s, Command{At: back, Register: reg}, Command{At: back, Register: g})
	sv, _ = s.Record("dc1").Server("a")
	if sv.Health != Passing || !sv.Since.Equal(back.Truncate(time.Second)) || !s.Has(reg) || !s.Has(g) {
		t.Errorf("server %+v", sv)
	}
}

func TestRemoval(t *testing.T) {
	a, b := srv("dc1", "a", "127.77.1.1"), srv("dc2", "b", "127.77.2.1")
	s := do(t, New(), register(a), register(b))
	was := s.Record("dc2").Index
	s = do(t, s, Command{Remove: &Removal{Keys: []Key{a.Key(), {"dc2", KindServer, "nobody"}}, Left: true}})
	if s.Len() != 1 || !s.Departed(a.Key()) || !s.Left(a.Key(), "s1") || s.Left(a.Key(), "s2") || s.Departed(b.Key()) {
		t.Errorf("%d records", s.Len())
	}
	if s.Record("dc2").Index != was {
		t.Error("a record that nothing was taken from has changed")
	}
	// Started again, it may come back.
	if n := do(t, s, register(with(a, Process{Start: "s2"}))); n.Departed(a.Key()) {
		t.Error("it is back and still counts as gone")
	}
	forgot := do(t, s, Command{At: start().Add(time.Hour), Remove: &Removal{Before: start().Add(time.Minute)}})
	if forgot.Departed(a.Key()) {
		t.Error("it was not forgotten")
	}
	do(t, forgot, register(a))
}

// A claim is a registration beside what a state has.
type claim struct {
	s      *State
	reg    *Registration
	after  time.Duration
	reason string // of the conflict; "" for none
	holder Key
}

func claims(t *testing.T) map[string]claim {
	t.Helper()
	one, other := Process{Start: "s1", Instance: "i1"}, Process{Start: "s2", Instance: "i2"}
	held := with(srv("dc1", "a", "127.77.1.1"), one)
	gateway := with(gw("dc1", "g", "gw.example:8443"), one)
	s := do(t, New(), register(held), register(gateway), register(srv("dc1", "b", "127.77.1.2")))
	moved := func(reg *Registration) *Registration {
		c := with(reg, other)
		if c.Server != nil {
			c.Server.Address = "10.0.0.7:1"
		} else {
			c.Gateway.Address = "10.0.0.7:1"
		}
		return c
	}
	restarted := with(moved(held), Process{Start: "s9", Instance: "i1"})
	otherPort := srv("dc2", "z", "127.77.1.1")
	otherPort.Server.Services = []Service{{"gossip-packet", "packet", 9302}, {"gossip-stream", "stream", 8302}}
	replaced := do(t, s, register(with(held, Process{Start: "s2", Instance: "i1"})))
	dead := do(t, s, Command{Critical: []Key{held.Key(), gateway.Key()}})
	gone := do(t, s, Command{Remove: &Removal{Keys: []Key{held.Key()}, Left: true}})
	changed := with(held, one)
	changed.Server.Address = "10.0.0.8:1"
	return map[string]claim{
		"the same again":                        {s, held, 0, "", Key{}},
		"the same process says something else":  {s, changed, 0, "", Key{}},
		"started anew at its addresses":         {s, with(held, other), 0, "", Key{}},
		"started anew with its data folder":     {s, restarted, 0, "", Key{}},
		"another process has the name":          {s, moved(held), 0, ConflictName, held.Key()},
		"another process has a gateway's name":  {s, moved(gateway), 0, ConflictName, gateway.Key()},
		"a gateway is started anew":             {s, with(gateway, other), 0, "", Key{}},
		"another server has the address":        {s, srv("dc2", "z", "127.77.1.1"), 0, ConflictAddress, held.Key()},
		"the same address and other ports":      {s, otherPort, 0, "", Key{}},
		"who was replaced does not come back":   {replaced, held, 0, ConflictName, held.Key()},
		"who was replaced, by a dead one":       {do(t, replaced, Command{Critical: []Key{held.Key()}}), held, TakeOver, "", Key{}},
		"a name of one that is dead a while":    {dead, moved(held), TakeOver - time.Second, ConflictName, held.Key()},
		"a name of one that is dead":            {dead, moved(held), TakeOver, "", Key{}},
		"a gateway's name of one that is dead":  {dead, moved(gateway), TakeOver, "", Key{}},
		"an address of one that is dead awhile": {dead, srv("dc2", "z", "127.77.1.1"), TakeOver - time.Second, ConflictAddress, held.Key()},
		"an address of one that is dead":        {dead, srv("dc2", "z", "127.77.1.1"), TakeOver, "", Key{}},
		"one that has left":                     {gone, held, 0, ConflictLeft, held.Key()},
		"one that has left, started again":      {gone, with(held, other), 0, "", Key{}},
	}
}

func TestConflicts(t *testing.T) {
	for name, c := range claims(t) {
		at := start().Add(c.after)
		err := c.s.Admit(c.reg, at)
		next, applied := c.s.Apply(c.s.Index()+1, Command{At: at, Register: c.reg})
		conflict, _ := errors.AsType[*ConflictError](err)
		switch {
		case (err == nil) != (applied == nil):
			t.Errorf("%s: Admit says %v, Apply %v", name, err, applied)
		case c.reason == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.reason == "":
			if !next.Has(c.reg) {
				t.Errorf("%s: it is not there", name)
			}
			sane(t, withoutOtherPorts(next))
		case conflict == nil || conflict.Reason != c.reason || conflict.Holder != c.holder || conflict.Key != c.reg.Key() || conflict.Error() == "":
			t.Errorf("%s: have %#v", name, err)
		case next != c.s:
			t.Errorf("%s: it was refused and has changed something", name)
		}
	}
}

// withoutOtherPorts leaves out the one server that shares an address by right.
func withoutOtherPorts(s *State) *State {
	n, _ := s.Apply(s.Index()+1, Command{At: start(), Remove: &Removal{Keys: []Key{{"dc2", KindServer, "z"}}}})
	return n
}

func TestTakenAddressHasOneHolder(t *testing.T) {
	a := srv("dc1", "a", "127.77.1.1")
	s := do(t, New(), register(a), Command{Critical: []Key{a.Key()}},
		Command{At: start().Add(TakeOver), Register: srv("dc2", "z", "127.77.1.1")})
	if s.Record("dc1") != nil || s.Record("dc2") == nil {
		t.Error("two have it, or none")
	}
}

func TestLimits(t *testing.T) {
	s := New()
	for i := range MaxServers {
		s = do(t, s, register(srv("dc1", fmt.Sprintf("n%d", i), fmt.Sprintf("10.0.%d.%d", i/250, i%250))))
	}
	for i := range MaxGateways {
		s = do(t, s, register(gw("dc1", fmt.Sprintf("g%d", i), "gw.example:8443")))
	}
	for _, reg := range []*Registration{srv("dc1", "more", "10.9.9.9"), gw("dc1", "more", "gw.example:8443")} {
		if next, err := s.Apply(9999, register(reg)); !errors.Is(err, ErrFull) || next != s {
			t.Errorf("%s: %v", reg.Key(), err)
		}
	}
	s = New()
	for i := range MaxDatacenters {
		s = do(t, s, register(gw(fmt.Sprintf("dc%d", i), "g", "gw.example:8443")))
	}
	if _, err := s.Apply(9999, register(gw("more", "g", "gw.example:8443"))); !errors.Is(err, ErrFull) {
		t.Error(err)
	}
	more := do(t, New(), register(gw("more", "g", "gw.example:8443")))
	if next, err := s.With("", 9999, more.All(), false); err == nil || next.Len() != MaxDatacenters {
		t.Errorf("a reader has %d datacenters: %v", next.Len(), err)
	}
}

func TestImpossibleEntries(t *testing.T) {
	long := strings.Repeat("x", maxWord+1)
	for name, change := range map[string]func(r *Registration){
		"neither":           func(r *Registration) { r.Server = nil },
		"both":              func(r *Registration) { r.Gateway = gw("dc1", "g", "h:1").Gateway },
		"no datacenter":     func(r *Registration) { r.Datacenter = "" },
		"two labels":        func(r *Registration) { r.Datacenter = "dc.1" },
		"upper case":        func(r *Registration) { r.Datacenter = "DC1" },
		"long label":        func(r *Registration) { r.Datacenter = strings.Repeat("a", 64) },
		"node":              func(r *Registration) { r.Server.Node = "a_b" },
		"hyphen":            func(r *Registration) { r.Server.Node = "-a" },
		"long node":         func(r *Registration) { r.Server.Node = strings.Repeat("a.", 127) + "a" },
		"no address":        func(r *Registration) { r.Server.Address = "10.0.0.1" },
		"port 0":            func(r *Registration) { r.Server.Address = "10.0.0.1:0" },
		"zone":              func(r *Registration) { r.Server.Address = "[fe80::1%eth0]:1" },
		"host":              func(r *Registration) { r.Server.Address = "a b:1" },
		"advertise":         func(r *Registration) { *r = *srv("dc1", "a", "0.0.0.0") },
		"multicast":         func(r *Registration) { *r = *srv("dc1", "a", "224.0.0.1") },
		"mapped":            func(r *Registration) { *r = *srv("dc1", "a", "::ffff:10.0.0.1") },
		"no service":        func(r *Registration) { r.Server.Services = nil },
		"service twice":     func(r *Registration) { r.Server.Services = append(r.Server.Services, r.Server.Services[0]) },
		"kind":              func(r *Registration) { r.Server.Services[0].Kind = "x" },
		"service's port":    func(r *Registration) { r.Server.Services[0].Port = 0 },
		"service's name":    func(r *Registration) { r.Server.Services[0].Name = "a.b" },
		"many services":     func(r *Registration) { r.Server.Services = make([]Service, MaxServices+1) },
		"no start":          func(r *Registration) { r.Server.Start = "" },
		"long start":        func(r *Registration) { r.Server.Start = long },
		"not printable":     func(r *Registration) { r.Server.Version = "\xff" },
		"newline":           func(r *Registration) { r.Server.Instance = "a\nb" },
		"health":            func(r *Registration) { r.Server.Health = "" },
		"gateway's address": func(r *Registration) { *r = *gw("dc1", "g", ":1") },
		"gateway's name":    func(r *Registration) { *r = *gw("dc1", "", "h:1") },
	} {
		reg := srv("dc1", "a", "127.77.1.1")
		change(reg)
		if next, err := New().Apply(1, register(reg)); err == nil || next.Len() != 0 {
			t.Errorf("%s: it was taken", name)
		}
	}
	if _, err := New().Apply(1, Command{At: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), Found: "x"}); err == nil {
		t.Error("a year that JSON does not have was taken")
	}
}

func TestRecordsInDisorder(t *testing.T) {
	s := do(t, New(), register(srv("dc1", "a", "127.77.1.1")), register(srv("dc1", "b", "127.77.1.2")))
	r := *s.Record("dc1")
	for name, servers := range map[string][]Server{
		"twice":      {r.Servers[0], r.Servers[0]},
		"disordered": {r.Servers[1], r.Servers[0]},
	} {
		c := r
		c.Servers = servers
		if c.Check() == nil {
			t.Errorf("%s: it is taken", name)
		}
		next, err := s.With("", 9, []json.RawMessage{c.encode()}, true)
		faults, ok := errors.AsType[Faults](err)
		if !ok || len(faults) != 1 || len(faults.Unwrap()) != 1 || next.Record("dc1").Check() != nil || next.Len() != 1 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	for _, b := range []string{"", "{}", `{"version":2}`, `{"version":1,"records":[{}]}`, `{"version":1,"records":[1]}`} {
		if _, err := Load([]byte(b)); err == nil {
			t.Errorf("%q was read", b)
		}
	}
}
