package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"culvert/federation/state"
)

func TestOneServer(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.start()
		changed := n.store.Changed()
		lease := register(t, server("dc2", "bob", "127.77.2.1"), n)
		if lease.TTL != 30*time.Second || lease.Index == 0 || len(lease.Warnings) != 0 {
			t.Fatalf("lease is %+v", lease)
		}
		<-changed
		if again := register(t, server("dc2", "bob", "127.77.2.1"), n); again.Index != lease.Index {
			t.Errorf("a renewal has changed the index from %d to %d", lease.Index, again.Index)
		}
		was := n.store.State()
		if was.Store() == "" || was.Index() != lease.Index || !has(was, server("dc2", "bob", "127.77.2.1")) {
			t.Fatalf("state is %s at %d", was.Store(), was.Index())
		}
		n.stop()
		if n.store.State() != was {
			t.Error("a stopped store does not answer any more")
		}
		s, err := Open(n.o)
		if err != nil {
			t.Fatal(err)
		}
		if !has(s.State(), server("dc2", "bob", "127.77.2.1")) {
			t.Error("what is on the disk is not read before Run")
		}
		s.Close()
		n.start()
		register(t, server("dc2", "bob", "127.77.2.1"), n)
		if now := n.store.State(); now.Store() != was.Store() || now.Index() != was.Index() || now.Hash() != was.Hash() {
			t.Errorf("after a restart the state is %s at %d, was %s at %d", now.Store(), now.Index(), was.Store(), was.Index())
		}
	})
}

func TestMemory(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		n.o.DataDir = ""
		n.start()
		register(t, server("dc1", "amy", "127.77.1.2"), n)
		sleep(10 * time.Second)
		if p := n.store.Peers(); len(p) != 1 || !p[0].Voter || !p[0].Leader || p[0].Node != "alice" {
			t.Errorf("peers are %+v", p)
		}
		if g := n.store.Greeting(); !g.Memory || !g.Begun || g.Store == "" {
			t.Errorf("greeting is %+v", g)
		}
	})
}

func TestOptions(t *testing.T) {
	w := newWorld(t)
	good := w.add("alice", 3).o
	for want, change := range map[string]func(o *Options){
		"Node":          func(o *Options) { o.Node = "" },
		"Expect is 2":   func(o *Options) { o.Expect = 2 },
		"one voter":     func(o *Options) { o.DataDir = "" },
		"Dial must":     func(o *Options) { o.Dial = nil },
		"Neighbours mu": func(o *Options) { o.Neighbours = nil },
	} {
		o := good
		change(&o)
		if _, err := Open(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error about %q, have %v", want, err)
		}
	}
	s, err := Open(good)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := Open(good); err == nil || !strings.Contains(err.Error(), "another culvert uses this data_dir") {
		t.Errorf("a folder in use was opened: %v", err)
	}
	s.Close() // twice is safe
}

// Three servers begin one store in whatever order they come, and a fourth
// joins.
func TestBegin(t *testing.T) {
	orders := [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	for seed, order := range orders {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				r := rand.New(rand.NewPCG(7, uint64(seed)))
				ns := []*node{w.add("alice", 3), w.add("amy", 3), w.add("art", 3)}
				for i, at := range order {
					if i == 2 && ns[order[0]].store.Greeting().Begun {
						t.Fatal("two of three have begun")
					}
					ns[at].start()
					sleep(time.Duration(r.Int64N(int64(20 * time.Second))))
				}
				leader(t, ns...)
				register(t, server("dc2", "bob", "127.77.2.1"), ns...)
				eventually(t, 5*time.Second, "all have the same", func() bool { return same(ns...) })
				joinFourth(t, w, ns)
			})
		})
	}
}

func same(ns ...*node) bool {
	a := ns[0].store.State()
	for _, n := range ns[1:] {
		b := n.store.State()
		if a.Store() == "" || a.Store() != b.Store() || a.Hash() != b.Hash() || a.Index() != b.Index() {
			return false
		}
	}
	return true
}

func joinFourth(t *testing.T, w *world, ns []*node) {
	t.Helper()
	late := w.add("zoe", 0)
	late.start()
	sleep(3 * time.Second)
	if st := late.store.Status(); st.Waiting == "" || late.store.Greeting().Begun {
		t.Errorf("a server that did not register was added: %+v", st)
	}
	stop := keep(t, []state.Registration{server("dc1", "zoe", "127.77.1.4")}, ns...)
	defer stop()
	eventually(t, 20*time.Second, "the fourth votes", func() bool {
		p := late.store.Peers()
		return len(p) == 4 && p[3].Node == "zoe" && p[3].Voter && same(append(ns, late)...)
	})
	if late.store.Status().Waiting != "" {
		t.Errorf("it still waits for %q", late.store.Status().Waiting)
	}
}

func TestFollowerNamesTheLeader(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		first := leader(t, ns...)
		for _, n := range ns {
			if n == first {
				continue
			}
			_, err := n.store.Register(t.Context(), numbered(1))
			other, ok := errors.AsType[*NotLeaderError](err)
			if !ok || other.Node != first.o.Node || other.Address != first.o.Address {
				t.Errorf("want the leader's name, have %v", err)
			}
			if err := n.store.Remove(t.Context(), nil, true); err == nil || err.Error() != other.Error() {
				t.Errorf("remove: %v", err)
			}
			if node, at, ok := n.store.Leader(); !ok || node != first.o.Node || at != first.o.Address {
				t.Errorf("leader is %s at %s", node, at)
			}
		}
		// Without a majority there is none, and reads go on.
		register(t, numbered(2), first)
		w.part(first, true)
		eventually(t, 5*time.Second, "it leads no more", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := first.store.Register(ctx, numbered(3))
			other, ok := errors.AsType[*NotLeaderError](err)
			return ok && other.Node == ""
		})
		if !has(first.store.State(), numbered(2)) {
			t.Error("it forgot what it knew")
		}
		next := leader(t, without(ns, first)...)
		register(t, numbered(4), next)
		w.part(first, false)
		eventually(t, 10*time.Second, "it follows", func() bool { return same(ns...) })
		if has(first.store.State(), numbered(3)) {
			t.Error("what was not agreed on is stored")
		}
	})
}

func without(ns []*node, not *node) []*node {
	var out []*node
	for _, n := range ns {
		if n != not {
			out = append(out, n)
		}
	}
	return out
}

// A leader that ends in good order hands over: nobody waits for an election.
func TestHandOver(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		first := leader(t, ns...)
		first.stop()
		rest := without(ns, first)
		before := time.Now()
		leader(t, rest...)
		if d := time.Since(before); d > time.Second {
			t.Errorf("the next leader took %v", d)
		}
	})
}

func TestPromise(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("amy", 3)
		n.start()
		of := func(names ...string) Proposal {
			var p Proposal
			for _, name := range names {
				p.Members = append(p.Members, Member{name, address(name)})
			}
			return p
		}
		one, other := of("alice", "amy", "art"), of("amy", "art", "zoe")
		for _, wrong := range []Proposal{of("alice", "amy"), of("alice", "art", "zoe"), of("amy", "amy", "art"), of("art", "amy", "alice")} {
			if n.store.Promise(wrong) == nil {
				t.Errorf("%v was promised to", wrong)
			}
		}
		if err := n.store.Promise(one); err != nil {
			t.Fatal(err)
		}
		if err := n.store.Promise(one); err != nil {
			t.Errorf("the same was refused: %v", err)
		}
		sleep(29 * time.Second)
		if err := n.store.Promise(other); err == nil || !strings.Contains(err.Error(), "alice, amy, art") {
			t.Errorf("a second set was promised to: %v", err)
		}
		sleep(2 * time.Second)
		if err := n.store.Promise(other); err != nil {
			t.Errorf("after 30 s: %v", err)
		}
	})
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		leader(t, ns...)
		sleep(time.Minute)
		p := Proposal{[]Member{{"alice", address("alice")}, {"amy", address("amy")}, {"zoe", address("zoe")}}}
		if err := ns[0].store.Promise(p); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("one that has begun has promised: %v", err)
		}
	})
}

// More servers than bootstrap_expect do not begin two stores.
func TestBeginOnce(t *testing.T) {
	for seed := range 4 {
		bubble(t, func(t *testing.T, w *world) {
			r := rand.New(rand.NewPCG(11, uint64(seed)))
			var ns []*node
			for _, name := range []string{"a", "b", "c", "d", "e"} {
				ns = append(ns, w.add(name, 3))
			}
			for _, i := range r.Perm(5) {
				ns[i].start()
				sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
			}
			leader(t, ns...)
			sleep(time.Minute)
			stores := make(map[string]int)
			for _, n := range ns {
				stores[n.store.State().Store()]++
			}
			if len(stores) != 2 || stores[""] != 2 {
				t.Errorf("seed %d: stores are %v", seed, stores)
			}
		})
	}
}

// What the disk holds is shown while there is no majority.
func TestReadsWithoutMajority(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		for i := range 20 {
			register(t, numbered(i), ns...)
		}
		eventually(t, 5*time.Second, "all have it", func() bool { return same(ns...) })
		was := ns[0].store.State()
		for _, n := range ns {
			n.kill()
		}
		ns[1].start()
		sleep(5 * time.Second)
		now := ns[1].store.State()
		if now.Hash() != was.Hash() || now.Store() != "" {
			t.Errorf("has %d records of store %q, had %d", now.Len(), now.Store(), was.Len())
		}
		ns[2].start()
		eventually(t, 20*time.Second, "it knows what counts", func() bool { return ns[1].store.State().Store() == was.Store() })
		if ns[1].store.State().Hash() != was.Hash() {
			t.Error("records have changed")
		}
	})
}
