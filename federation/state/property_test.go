package state

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"testing"
)

// The same commands make the same bytes, on whatever server, and whenever one of
// them was restarted from a snapshot.
func TestSameCommandsSameBytes(t *testing.T) {
	for seed := range uint64(20) {
		r := newScript(seed)
		a := do(t, New(), Command{Found: "one"})
		b := a
		for i := range 150 {
			c := logged(t, r.next())
			if i%3 == 0 {
				c.Critical = slices.Clone(c.Critical)
				slices.Reverse(c.Critical) // the order of keys is no matter
			}
			var errA, errB error
			a, errA = a.Apply(uint64(i+2), c)
			if r.IntN(10) == 0 {
				again, err := Load([]byte(dumped(t, b)))
				if err != nil {
					t.Fatal(err)
				}
				b = again
			}
			b, errB = b.Apply(uint64(i+2), logged(t, c))
			if (errA == nil) != (errB == nil) || dumped(t, a) != dumped(t, b) || a.Hash() != b.Hash() {
				t.Fatalf("seed %d, command %d: %v and %v\n%s\n%s", seed, i, errA, errB, dumped(t, a), dumped(t, b))
			}
			sane(t, a)
		}
	}
}

// sane holds what is true of every state.
func sane(t *testing.T, s *State) {
	t.Helper()
	holders := make(map[string]Key)
	count := make(map[Kind]map[Health]int)
	for _, k := range []Kind{KindServer, KindGateway} {
		count[k] = make(map[Health]int)
	}
	for _, r := range s.Records() {
		for _, g := range r.Gateways {
			count[KindGateway][g.Health]++
		}
		if err := r.Check(); err != nil {
			t.Fatalf("record of %s: %v", r.Datacenter, err)
		}
		if len(r.Servers)+len(r.Gateways) == 0 || r.Index > s.Index() || r.Removed {
			t.Fatalf("record of %s is empty, from the future or removed: %+v", r.Datacenter, r)
		}
		for _, sv := range r.Servers {
			k := Key{r.Datacenter, KindServer, sv.Node}
			if other, taken := holders[sv.Advertise.String()]; taken {
				t.Fatalf("%s and %s have one address", other, k)
			}
			holders[sv.Advertise.String()] = k
			count[KindServer][sv.Health]++
			if !s.entry(r.Datacenter).addresses.mayHave(sv.Advertise) {
				t.Fatalf("the address of %s is not found", k)
			}
		}
	}
	for k, by := range count {
		for _, h := range []Health{Passing, Critical} {
			if by[h] != s.Count(k, h) {
				t.Fatalf("%d %s are %s, and %d are counted", by[h], k, h, s.Count(k, h))
			}
		}
	}
	if !slices.IsSortedFunc(s.entries, func(a, b *entry) int { return strictly(a.Datacenter, b.Datacenter) }) {
		t.Fatal("the records are in disorder")
	}
}

// What a reader makes of changes, however often it asks and of whichever store,
// is what the store has.
func TestReadersSeeTheSame(t *testing.T) {
	for seed := range uint64(8) {
		r := newScript(seed)
		leader := do(t, New(), Command{Found: "one"})
		readers := make([]*State, 4)
		for i := range readers {
			readers[i] = New()
		}
		for i := range 400 {
			leader, _ = leader.Apply(leader.Index()+uint64(1+r.IntN(3)), r.next())
			if i == 200 { // another store takes its place, with indices of its own
				leader = do(t, New(), Command{Found: "two"})
			}
			for n := range readers {
				if r.IntN(1<<n*3) == 0 {
					readers[n] = follow(t, leader, readers[n])
				}
			}
		}
		for n := range readers {
			readers[n] = follow(t, leader, readers[n])
		}
	}
}

// follow makes a reader ask.
func follow(t *testing.T, leader, reader *State) *State {
	t.Helper()
	changes, full := leader.Changes(reader.Store(), reader.Index())
	wire, err := json.Marshal(changes)
	if err != nil {
		t.Fatal(err)
	}
	var got []json.RawMessage
	if err := json.Unmarshal(wire, &got); err != nil {
		t.Fatal(err)
	}
	before := dumped(t, reader)
	defer sane(t, reader)
	next, err := reader.With(leader.Store(), leader.Index(), got, full)
	if err != nil {
		t.Fatal(err)
	}
	if next.Hash() != leader.Hash() || next.Len() != leader.Len() || next.Index() != leader.Index() || next.Store() != leader.Store() {
		t.Fatalf("reader at %d has other records than the store at %d:\n%s\n%s", reader.Index(), leader.Index(), next.All(), leader.All())
	}
	if dumped(t, reader) != before {
		t.Fatal("a state has changed")
	}
	again, full := leader.Changes(next.Store(), next.Index())
	if len(again) > 0 || full {
		t.Fatalf("there are changes since the last one: %s", again)
	}
	// One that asks the reader gets it all, for it cannot tell what has gone.
	if changes, full := next.Changes(reader.Store(), reader.Index()); reader.Index() < next.Index() && (!full || len(changes) != next.Len()) {
		t.Fatal("a reader tells of changes that it did not see")
	}
	return next
}

// A datacenter that comes and goes is told of, for as long as that is
// remembered; whoever asks about what was before gets everything.
func TestGoneDatacenters(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	s := do(t, New(), Command{Found: "one"}, register(srv("kept", "a", "127.0.9.1")))
	var states []*State
	for i := range 2 * maxGone {
		reg := srv("gone", "b", "127.0.9.2")
		reg.Datacenter = string(rune('a'+i%26)) + string(rune('a'+i/26%26)) + "x"
		s = do(t, s, register(reg), Command{Remove: &Removal{Keys: []Key{reg.Key()}}})
		states = append(states, s)
	}
	for range 100 {
		old := states[r.IntN(len(states))]
		changes, full := s.Changes("one", old.Index())
		if want := s.Index()-old.Index() > 2*maxGone; full != want {
			t.Fatalf("since %d of %d: full is %v", old.Index(), s.Index(), full)
		}
		reader, err := New().With("one", old.Index(), old.All(), true)
		if err == nil {
			reader, err = reader.With("one", s.Index(), changes, full)
		}
		if err != nil || reader.Hash() != s.Hash() {
			t.Fatalf("since %d: %v", old.Index(), err)
		}
	}
	again, err := Load([]byte(dumped(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := again.Changes("one", s.Index()-2); len(a) != 1 {
		t.Errorf("a snapshot has forgotten what has gone: %s", a)
	}
}

func FuzzLoad(f *testing.F) {
	for _, s := range loadSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Load(b)
		if err != nil {
			return
		}
		once := dumped(t, s)
		again, err := Load([]byte(once))
		if err != nil {
			t.Fatalf("what was written is not read: %v", err)
		}
		if twice := dumped(t, again); once != twice {
			t.Fatalf("it is not the same when it is read again:\n%s\n%s", once, twice)
		}
		if next, _ := s.Apply(s.Index()+1, Command{At: start(), Register: srv("dc1", "a", "127.0.0.1")}); next == nil {
			t.Fatal("no state")
		}
	})
}

func loadSeeds(t testing.TB) [][]byte {
	s := do(t, New(), Command{Found: "one"}, register(srv("dc1", "a", "127.0.0.1")), register(gw("dc2", "g", "[2001:db8::1]:8443")),
		register(srv("dc3", "c", "127.0.0.3")), Command{Remove: &Removal{Keys: []Key{{"dc3", KindServer, "c"}}, Left: true}})
	return [][]byte{[]byte(dumped(t, New())), []byte(dumped(t, s))}
}

func TestLoadSeeds(t *testing.T) {
	for i, want := range []int{0, 2} {
		if s, err := Load(loadSeeds(t)[i]); err != nil || s.Len() != want {
			t.Errorf("seed %d: %v", i, err)
		}
	}
}

// A reader takes whatever an answer has: what is in its records afterwards is
// possible, or was there before.
func FuzzWith(f *testing.F) {
	s := do(f, New(), Command{Found: "one"}, register(srv("dc1", "a", "127.0.0.1")), register(gw("dc2", "g", "gw.example:1")))
	all, err := json.Marshal(s.All())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(all, true)
	f.Add([]byte(`[{"datacenter":"dc1","removed":true},{"datacenter":"dc9"},{}]`), false)
	f.Fuzz(func(t *testing.T, b []byte, full bool) {
		var records []json.RawMessage
		if json.Unmarshal(b, &records) != nil {
			return
		}
		before := dumped(t, s)
		next, err := s.With("one", s.Index()+1, records, full)
		for _, r := range next.Records() {
			if err := r.Check(); err != nil {
				t.Fatalf("an impossible record was taken: %v", err)
			}
		}
		if err == nil && len(records) > 0 && !full && next.Len() > s.Len()+len(records) {
			t.Fatal("records came from nowhere")
		}
		if dumped(t, s) != before {
			t.Fatal("a state has changed")
		}
	})
}
