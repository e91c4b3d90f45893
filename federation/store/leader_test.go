package store

import (
	"errors"
	"strings"
	"testing"
	"time"

	"culvert/federation/state"
)

func find(s *state.State, reg state.Registration) (state.Server, bool) {
	if r := s.Record(reg.Datacenter); r != nil {
		return r.Server(reg.Server.Node)
	}
	return state.Server{}, false
}

// What is not renewed turns critical, may be taken over after two minutes, and
// is forgotten in the end.
func TestLease(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		kept, lost := numbered(1), server("dc2", "bob", "127.77.2.1")
		stop := keep(t, []state.Registration{kept}, ns...)
		defer stop()
		began := time.Now()
		register(t, lost, ns...)
		health := func() state.Health { sv, _ := find(ns[2].store.State(), lost); return sv.Health }
		eventually(t, 2*time.Second, "it is passing", func() bool { return health() == state.Passing })
		eventually(t, 40*time.Second, "it is critical", func() bool { return health() == state.Critical })
		if d := time.Since(began); d < 30*time.Second || d > 35*time.Second {
			t.Errorf("it was critical after %v", d)
		}
		if sv, _ := find(ns[2].store.State(), kept); sv.Health != state.Passing {
			t.Error("one that is renewed is critical")
		}
		takeOver(t, ns, lost)
	})
}

// takeOver claims the address of an entry that has just turned critical.
func takeOver(t *testing.T, ns []*node, lost state.Registration) {
	t.Helper()
	thief := server("dc3", "carol", "127.77.2.1")
	critical := time.Now()
	for {
		_, err := leader(t, ns...).store.Register(t.Context(), thief)
		if err == nil {
			break
		}
		c, ok := errors.AsType[*state.ConflictError](err)
		if !ok || c.Reason != state.ConflictAddress || c.Holder != lost.Key() {
			t.Fatal(err)
		}
		sleep(time.Second)
	}
	if d := time.Since(critical); d < 115*time.Second || d > 125*time.Second {
		t.Errorf("it was taken over after %v", d)
	}
	eventually(t, time.Second, "the address has changed hands", func() bool {
		_, old := find(ns[0].store.State(), lost)
		return !old && has(ns[0].store.State(), thief)
	})
}

func TestReap(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.o.Reap = time.Hour
		n.start()
		gone, left := server("dc2", "bob", "127.77.2.1"), server("dc2", "ben", "127.77.2.2")
		register(t, gone, n)
		register(t, left, n)
		if err := n.store.Remove(t.Context(), []state.Key{left.Key()}, true); err != nil {
			t.Fatal(err)
		}
		if _, err := n.store.Register(t.Context(), left); err == nil || !strings.Contains(err.Error(), "left the federation") {
			t.Errorf("one that left is back: %v", err)
		}
		again := left
		sv := *left.Server
		again.Server = &sv
		sv.Start = "ben-2"
		register(t, again, n)
		if err := n.store.Remove(t.Context(), []state.Key{left.Key()}, true); err != nil {
			t.Fatal(err)
		}
		sleep(59 * time.Minute)
		if sv, ok := find(n.store.State(), gone); !ok || sv.Health != state.Critical {
			t.Errorf("after 59 minutes it is %+v", sv)
		}
		sleep(4 * time.Minute)
		if n.store.State().Len() != 0 {
			t.Error("it was not forgotten")
		}
		if n.store.State().Departed(left.Key()) {
			t.Error("a departure was not forgotten")
		}
	})
}

// Whoever is refused is told why, and the one that holds what was claimed hears
// of it with its next renewal, once.
func TestWarnings(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.start()
		holder, byAddress := server("dc2", "bob", "127.77.2.1"), server("dc3", "carol", "127.77.2.1")
		byName := server("dc2", "bob", "127.77.2.9")
		byName.Server.Start, byName.Server.Address = "other", "other.lan:8443"
		register(t, holder, n)
		for _, claim := range []state.Registration{byAddress, byAddress, byName} {
			_, err := n.store.Register(t.Context(), claim)
			if c, ok := errors.AsType[*state.ConflictError](err); !ok || c.Holder != holder.Key() {
				t.Fatalf("want a conflict with %s, have %v", holder.Key(), err)
			}
		}
		w1 := register(t, holder, n).Warnings
		if len(w1) != 2 || !strings.Contains(w1[0], "dc3/carol") || !strings.Contains(w1[0], "127.77.2.1") || !strings.Contains(w1[1], "other.lan:8443") {
			t.Errorf("warnings are %q", w1)
		}
		if w2 := register(t, holder, n).Warnings; len(w2) != 0 {
			t.Errorf("it is told again: %q", w2)
		}
		_, _ = n.store.Register(t.Context(), byAddress)
		sleep(4 * time.Minute)
		if w3 := register(t, holder, n).Warnings; len(w3) != 0 {
			t.Errorf("it is told of what was long ago: %q", w3)
		}
		last := n.store.current().raft.LastIndex()
		for range 10 {
			_, _ = n.store.Register(t.Context(), byAddress)
		}
		if now := n.store.current().raft.LastIndex(); now != last {
			t.Errorf("refused registrations have made %d entries in the log", now-last)
		}
	})
}

// A new leader gives everybody a whole lease.
func TestLeaseOutlivesTheLeader(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		reg := server("dc2", "bob", "127.77.2.1")
		register(t, reg, ns...)
		sleep(25 * time.Second)
		first := leader(t, ns...)
		first.kill()
		rest := without(ns, first)
		leader(t, rest...)
		sleep(20 * time.Second)
		if sv, _ := find(rest[0].store.State(), reg); sv.Health != state.Passing {
			t.Error("it is critical under a leader that could not have heard of it yet")
		}
		sleep(15 * time.Second)
		if sv, _ := find(rest[0].store.State(), reg); sv.Health != state.Critical {
			t.Error("it is still passing")
		}
	})
}

// The raft group follows what is registered.
func TestMembers(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		regs := []state.Registration{server("dc1", "alice", "127.77.1.1"), server("dc1", "amy", "127.77.1.2"), server("dc1", "art", "127.77.1.3")}
		for _, r := range regs {
			register(t, r, ns...)
		}
		first := leader(t, ns...)
		stop := keep(t, without2(regs, first.o.Node), without(ns, first)...)
		// The leader itself leaves.
		key := state.Key{Datacenter: "dc1", Kind: state.KindServer, Name: first.o.Node}
		if err := first.store.Remove(t.Context(), []state.Key{key}, true); err != nil {
			t.Fatal(err)
		}
		rest := without(ns, first)
		eventually(t, 15*time.Second, "it is no member", func() bool { return len(rest[0].store.Peers()) == 2 })
		second := leader(t, rest...)
		if second == first {
			t.Fatal("it leads")
		}
		// One that is dead is removed by hand; the last one stays.
		other := without(rest, second)[0]
		stop()
		if err := second.store.RemovePeer(t.Context(), other.o.Node); err != nil {
			t.Fatal(err)
		}
		if err := second.store.RemovePeer(t.Context(), second.o.Node); err == nil || !strings.Contains(err.Error(), "last voter") {
			t.Errorf("the last voter was removed: %v", err)
		}
		if err := second.store.RemovePeer(t.Context(), "nobody"); err == nil || !strings.Contains(err.Error(), "no member") {
			t.Errorf("nobody was removed: %v", err)
		}
		if err := second.store.Remove(t.Context(), []state.Key{{Datacenter: "dc1", Kind: state.KindServer, Name: second.o.Node}}, true); err != nil {
			t.Fatal(err)
		}
		sleep(20 * time.Second)
		if p := second.store.Peers(); len(p) != 1 || !p[0].Voter || p[0].Node != second.o.Node {
			t.Errorf("peers are %+v", p)
		}
		register(t, numbered(1), second)
	})
}

func without2(regs []state.Registration, node string) []state.Registration {
	var out []state.Registration
	for _, r := range regs {
		if r.Server.Node != node {
			out = append(out, r)
		}
	}
	return out
}

// RemovePeer of the leader hands over first.
func TestRemoveLeader(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		first := leader(t, ns...)
		_, ok := errors.AsType[*NotLeaderError](first.store.RemovePeer(t.Context(), first.o.Node))
		if !ok {
			t.Fatal("it did not name another")
		}
		next := leader(t, without(ns, first)...)
		if err := next.store.RemovePeer(t.Context(), first.o.Node); err != nil {
			t.Fatal(err)
		}
		if p := next.store.Peers(); len(p) != 2 {
			t.Errorf("peers are %+v", p)
		}
	})
}

// A server with a store of its own, or none on its disk, does not join.
func TestForeignServerStaysOut(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n, foreign := w.add("alice", 1), w.add("zoe", 1)
		n.start()
		foreign.start()
		leader(t, foreign)
		stop := keep(t, []state.Registration{server("dc1", "zoe", "127.77.1.4")}, n)
		defer stop()
		sleep(20 * time.Second)
		if p := n.store.Peers(); len(p) != 1 {
			t.Errorf("peers are %+v", p)
		}
	})
}
