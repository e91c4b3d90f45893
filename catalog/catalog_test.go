package catalog

import (
	"net/netip"
	"testing"
)

func TestSnapshotLookups(t *testing.T) {
	c := New(&Snapshot{
		Peers: []Peer{
			{Key: Key{"dc2", "bob"}, Advertise: netip.MustParseAddr("127.77.2.1")},
			{Key: Key{"dc1", "zoe"}, Address: "10.0.0.1:8443"},
			{Key: Key{"dc1", "amy"}},
		},
		Datacenters: []Datacenter{{Name: "dc2", Mode: ModeRemote}},
	})
	s := c.Load()
	var order []string
	for _, p := range s.Peers {
		order = append(order, p.String())
	}
	if got, want := len(order), 3; got != want || order[0] != "dc1/amy" || order[1] != "dc1/zoe" || order[2] != "dc2/bob" {
		t.Errorf("peers in order %v", order)
	}
	if p, ok := s.Peer(Key{"dc1", "zoe"}); !ok || p.Address != "10.0.0.1:8443" {
		t.Errorf("Peer(dc1/zoe) = %v, %v", p, ok)
	}
	for _, k := range []Key{{"dc1", "bob"}, {"dc2", ""}, {"", ""}} {
		if p, ok := s.Peer(k); ok {
			t.Errorf("Peer(%v) = %v", k, p)
		}
	}
	if d, ok := s.Datacenter("dc2"); !ok || d.Mode != ModeRemote {
		t.Errorf("Datacenter(dc2) = %v, %v", d, ok)
	}
	if _, ok := s.Datacenter("dc1"); ok {
		t.Error("Datacenter(dc1) was found")
	}
}

func TestChangedIsClosedByTheNextStore(t *testing.T) {
	c := New(&Snapshot{})
	changed := c.Changed()
	select {
	case <-changed:
		t.Fatal("closed before any Store")
	default:
	}
	next := &Snapshot{Gateways: []string{"gw:8443"}}
	c.Store(next)
	select {
	case <-changed:
	default:
		t.Fatal("not closed by Store")
	}
	if c.Load() != next {
		t.Error("Load does not return what was stored")
	}
	if c.Changed() == changed {
		t.Error("Changed returns the closed channel")
	}
}

func TestDatacentersThatAreKnown(t *testing.T) {
	s := New(&Snapshot{
		Self: Key{"dc2", "alice"},
		Peers: []Peer{
			{Key: Key{"dc3", "bob"}}, {Key: Key{"dc5", "b"}}, {Key: Key{"dc5", "a"}}, {Key: Key{"dc1", "amy"}},
		},
		Datacenters: []Datacenter{{Name: "dc4", Mode: ModeAuto}},
	}).Load()
	for dc, want := range map[string]int{"dc1": 1, "dc2": 0, "dc3": 1, "dc4": 0, "dc5": 2} {
		if !s.Knows(dc) {
			t.Errorf("%s is not known", dc)
		}
		in := s.In(dc)
		if len(in) != want {
			t.Errorf("%v are in %s", in, dc)
		}
		for _, p := range in {
			if p.Datacenter != dc {
				t.Errorf("%s is in %s", p, dc)
			}
		}
	}
	for _, dc := range []string{"", "dc", "dc6", "dc11"} {
		if s.Knows(dc) || len(s.In(dc)) > 0 {
			t.Errorf("%q is known", dc)
		}
	}
	if empty := (&Snapshot{}); empty.Knows("") || len(empty.In("dc1")) > 0 {
		t.Error("something is known of nothing")
	}
}
