package federation

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/testpki"
)

func alice() *state.Registration { return server("dc1", "alice", "127.77.1.1") }
func bob() *state.Registration   { return server("dc2", "bob", "127.77.2.1") }
func gw1() *state.Registration   { return gateway("dc1", "gw1", "203.0.113.7:8443") }

// reading is a world with one sidecar over a fake store, and a gateway that asks.
func readingBubble(t *testing.T, f func(t *testing.T, fake *fakeStore, tr *http.Transport)) {
	t.Helper()
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(stateOf(t, "S", gw1(), alice(), bob()))
		w.serve("alice", fake, APIOptions{})
		f(t, fake, w.transport(testpki.Gateway("dc2", "gw2")))
	})
}

func keys(t *testing.T, raw []byte) []string {
	t.Helper()
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatalf("%s: %v", raw, err)
	}
	return slices.Sorted(maps.Keys(m))
}

func wantKeys(t *testing.T, what string, raw []byte, want string) {
	t.Helper()
	if got := strings.Join(keys(t, raw), " "); got != want {
		t.Errorf("%s has the keys %s, want %s", what, got, want)
	}
}

// What the design promises of the JSON, tools outside rely on.
func TestShape(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		all := ask(t, tr, http.MethodGet, "/v1/federation-states", "")
		var records []json.RawMessage
		if err := json.Unmarshal([]byte(all.body), &records); err != nil || all.code != http.StatusOK || len(records) != 2 {
			t.Fatalf("%d %s: %v", all.code, all.body, err)
		}
		one := ask(t, tr, http.MethodGet, "/v1/federation-state/dc1", "")
		if one.body != string(records[0]) {
			t.Errorf("one record is %s, among all it is %s", one.body, records[0])
		}
		wantKeys(t, "a record", records[0], "datacenter gateways index servers updated_at")
		var r struct {
			Index             uint64
			Gateways, Servers []json.RawMessage
		}
		if err := json.Unmarshal(records[0], &r); err != nil || r.Index == 0 {
			t.Fatalf("%s: %v", records[0], err)
		}
		wantKeys(t, "a gateway", r.Gateways[0], "address health name since start version wan_address")
		wantKeys(t, "a server", r.Servers[0], "address advertise health node services since start version")
		var sv struct{ Services []json.RawMessage }
		if err := json.Unmarshal(r.Servers[0], &sv); err != nil {
			t.Fatal(err)
		}
		if string(sv.Services[0]) != `{"name":"gossip-packet","kind":"packet","port":7946}` {
			t.Errorf("a service is %s", sv.Services[0])
		}
		if !strings.Contains(string(records[1]), `"gateways":[]`) {
			t.Errorf("a datacenter without gateways is %s", records[1])
		}
		for name, want := range map[string]string{
			IndexHeader: fmt.Sprint(fake.State().Index()), StoreHeader: "S", FullHeader: "", "Content-Type": "application/json",
			"Cache-Control": "no-store", "Etag": `"` + fake.State().Hash() + `"`,
		} {
			if got := all.header.Get(name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
	})
}

// None is an empty list in the map of gateways too.
func TestMeshGateways(t *testing.T) {
	readingBubble(t, func(t *testing.T, _ *fakeStore, tr *http.Transport) {
		got := ask(t, tr, http.MethodGet, "/v1/federation-states/mesh-gateways", "")
		var m map[string]json.RawMessage
		if err := json.Unmarshal([]byte(got.body), &m); err != nil {
			t.Fatal(err)
		}
		if string(m["dc2"]) != "[]" || len(m) != 2 || !strings.Contains(string(m["dc1"]), `"wan_address":"203.0.113.7:8443"`) {
			t.Errorf("gateways are %s", got.body)
		}
	})
}

func TestNothingAndNobody(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.serve("alice", newFakeStore(state.New()), APIOptions{})
		tr := w.transport(testpki.Server("dc2", "bob"))
		for path, want := range map[string]string{"/v1/federation-states": "[]", "/v1/federation-states/mesh-gateways": "{}"} {
			if got := ask(t, tr, http.MethodGet, path, ""); got.body != want || got.code != http.StatusOK {
				t.Errorf("%s of an empty store answers %d %s", path, got.code, got.body)
			}
		}
		got := ask(t, tr, http.MethodGet, "/v1/federation-state/dc9?index=4", "")
		if f := got.failure(t); got.code != http.StatusNotFound || f.Error != `no datacenter "dc9" is known` || got.header.Get(IndexHeader) != "0" {
			t.Errorf("a datacenter that is not known: %d %s %v", got.code, got.body, got.header)
		}
	})
}

func TestBadParameters(t *testing.T) {
	readingBubble(t, func(t *testing.T, _ *fakeStore, tr *http.Transport) {
		for query, want := range map[string]string{
			"index=-1":                     `index "-1" is no number`,
			"index=x":                      `index "x" is no number`,
			"index=18446744073709551616":   `is no number`,
			"wait=60":                      `wait "60" is no duration`,
			"wait=-1s":                     `wait "-1s" is no duration`,
			"wait=x":                       `want one such as 60s, 10m0s at most`,
			"index=1&wait=9999999999999h1": `is no duration`,
		} {
			for _, path := range []string{"/v1/federation-states", "/v1/federation-states/mesh-gateways", "/v1/federation-state/dc1"} {
				got := ask(t, tr, http.MethodGet, path+"?"+query, "")
				if f := got.failure(t); got.code != http.StatusBadRequest || !strings.Contains(f.Error, want) {
					t.Errorf("%s?%s: %d %s", path, query, got.code, got.body)
				}
			}
		}
	})
}

func TestETag(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		for _, path := range []string{"/v1/federation-states", "/v1/federation-states/mesh-gateways", "/v1/federation-state/dc2"} {
			tag := ask(t, tr, http.MethodGet, path, "").header.Get("ETag")
			if got := ask(t, tr, http.MethodGet, path, "", "If-None-Match", tag); got.code != http.StatusNotModified || got.body != "" || got.header.Get(IndexHeader) == "" {
				t.Errorf("%s, unchanged: %d %q", path, got.code, got.body)
			}
			if got := ask(t, tr, http.MethodGet, path, "", "If-None-Match", `"x"`); got.code != http.StatusOK {
				t.Errorf("%s, changed: %d", path, got.code)
			}
		}
		before := fake.State().Hash()
		fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		if got := ask(t, tr, http.MethodGet, "/v1/federation-states", "", "If-None-Match", `"`+before+`"`); got.code != http.StatusOK {
			t.Errorf("after a change: %d", got.code)
		}
	})
}

// later asks in the background, and tells what was answered when.
func later(t *testing.T, tr http.RoundTripper, path string) <-chan reply {
	t.Helper()
	done := make(chan reply, 1)
	go func() { done <- ask(t, tr, http.MethodGet, path, "") }()
	synctest.Wait()
	return done
}

func TestBlocking(t *testing.T) {
	for _, path := range []string{"/v1/federation-states", "/v1/federation-states/mesh-gateways", "/v1/federation-state/dc2"} {
		t.Run(path[4:], func(t *testing.T) {
			readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
				start := time.Now()
				at := fmt.Sprintf("%s?index=%d", path, fake.State().Index())
				waits := later(t, tr, at+"&wait=10s")
				time.Sleep(4 * time.Second)
				select {
				case got := <-waits:
					t.Fatalf("answered before there was anything new: %+v", got)
				default:
				}
				fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
				if got := <-waits; time.Since(start) != 4*time.Second || got.code != http.StatusOK || got.header.Get(IndexHeader) != fmt.Sprint(fake.State().Index()) {
					t.Errorf("after %v: %+v", time.Since(start), got)
				}
				start = time.Now()
				if got := ask(t, tr, http.MethodGet, at, ""); got.code != http.StatusOK || time.Since(start) != 0 {
					t.Errorf("what is new already took %v", time.Since(start))
				}
				if ask(t, tr, http.MethodGet, path+"?wait=10s", ""); time.Since(start) != 0 {
					t.Errorf("without an index it took %v", time.Since(start))
				}
				at = fmt.Sprintf("%s?index=%d", path, fake.State().Index())
				if ask(t, tr, http.MethodGet, at+"&wait=0s", ""); time.Since(start) != 0 {
					t.Errorf("with no time to wait it took %v", time.Since(start))
				}
				for wait, least := range map[string]time.Duration{"&wait=16s": 16 * time.Second, "": DefaultWait, "&wait=24h": MaxWait} {
					start = time.Now()
					got := ask(t, tr, http.MethodGet, at+wait, "")
					if d := time.Since(start); got.code != http.StatusOK || d < least || d > least+least/16 {
						t.Errorf("with %q and nothing new: %d after %v", wait, got.code, d)
					}
				}
			})
		})
	}
}

// Who waits for one datacenter is not told of the others.
func TestBlockingOnOne(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		start := time.Now()
		waits := later(t, tr, fmt.Sprintf("/v1/federation-state/dc2?index=%d&wait=1m", fake.State().Index()))
		time.Sleep(time.Second)
		fake.do(t, state.Command{Critical: []state.Key{alice().Key()}})
		time.Sleep(time.Second)
		fake.do(t, removal(bob().Key()))
		if got := <-waits; got.code != http.StatusNotFound || time.Since(start) != 2*time.Second {
			t.Errorf("after %v: %+v", time.Since(start), got)
		}
	})
}

func TestChanges(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		at := fake.State().Index()
		fake.do(t, removal(bob().Key()))
		fake.do(t, state.Command{Register: server("dc3", "carol", "127.77.3.1")})
		for query, want := range map[string]struct{ full, datacenters string }{
			"":                                {"true", "dc1 dc3"},
			"&index=0":                        {"true", "dc1 dc3"},
			"&store=T&index=99":               {"true", "dc1 dc3"},
			"&store=&index=99":                {"true", "dc1 dc3"},
			fmt.Sprint("&store=S&index=", at): {"false", "dc3 -dc2"},
			fmt.Sprint("&store=S&wait=0s&index=", fake.State().Index()): {"false", ""},
		} {
			got := ask(t, tr, http.MethodGet, "/v1/federation-states?changes"+query, "")
			var records []state.Record
			if err := json.Unmarshal([]byte(got.body), &records); err != nil {
				t.Fatal(err)
			}
			var dcs []string
			for _, r := range records {
				name := r.Datacenter
				if r.Removed {
					name = "-" + name
				}
				dcs = append(dcs, name)
			}
			if full := got.header.Get(FullHeader); full != want.full || strings.Join(dcs, " ") != want.datacenters {
				t.Errorf("changes%s: full %s, %v", query, full, dcs)
			}
		}
	})
}

// A reader of a state that came from no store hears at once when there is one,
// though the index may be the same.
func TestStoreComesToBe(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		s := stateOf(t, "S", alice())
		none, err := state.New().With("", s.Index(), s.All(), true)
		if err != nil {
			t.Fatal(err)
		}
		fake := newFakeStore(none)
		w.serve("alice", fake, APIOptions{})
		tr := w.transport(testpki.Server("dc2", "bob"))
		start := time.Now()
		waits := later(t, tr, fmt.Sprintf("/v1/federation-states?changes&store=&index=%d", s.Index()))
		time.Sleep(time.Second)
		fake.set(s)
		if got := <-waits; time.Since(start) != time.Second || got.header.Get(StoreHeader) != "S" || got.header.Get(FullHeader) != "true" {
			t.Errorf("after %v: %+v", time.Since(start), got)
		}
	})
}

// Everybody who waits is answered by one change.
func TestManyWait(t *testing.T) {
	const readers, each = 3000, 50
	readingBubble(t, func(t *testing.T, fake *fakeStore, _ *http.Transport) {
		h := ReadHandler(fake, nil)
		path := fmt.Sprintf("/v1/federation-states?changes&store=S&index=%d&wait=10m", fake.State().Index())
		done := make(chan *httptest.ResponseRecorder, readers)
		for range readers {
			go func() {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
				done <- w
			}()
		}
		synctest.Wait()
		start := time.Now()
		fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		want := ""
		for range readers {
			w := <-done
			if want == "" {
				want = w.Body.String()
			}
			if w.Code != http.StatusOK || w.Body.String() != want || !strings.Contains(want, `"critical"`) {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("answered after %v", d)
		}
	})
	bubble(t, func(t *testing.T, w *world) { // and over real connections, as many as one takes
		fake := newFakeStore(stateOf(t, "S", bob()))
		w.serve("alice", fake, APIOptions{})
		tr := w.transport(testpki.Server("dc2", "bob"))
		done := make(chan reply, each)
		for range each {
			go func() { done <- ask(t, tr, http.MethodGet, "/v1/federation-states?index=2&wait=10m", "") }()
		}
		synctest.Wait()
		fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		for range each {
			if got := <-done; got.code != http.StatusOK || !strings.Contains(got.body, `"critical"`) {
				t.Errorf("%+v", got)
			}
		}
		if got := strings.Fields(w.dialled()); len(got) != 1 {
			t.Errorf("dialled %v", got)
		}
	})
}

// Whoever waits is answered when the sidecar stops.
func TestStopAnswers(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		x := w.serve("alice", newFakeStore(stateOf(t, "S", bob())), APIOptions{})
		waits := later(t, w.transport(testpki.Server("dc2", "bob")), "/v1/federation-states?index=2&wait=10m")
		x.server.Close()
		if got := <-waits; got.code != http.StatusOK {
			t.Errorf("%+v", got)
		}
	})
}

// A sidecar that has known no leader for a while may be cut off: it answers, and
// sends its clients to another connection, which may lead to another sidecar.
func TestAstray(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(stateOf(t, "S", bob()))
		w.serve("alice", fake, APIOptions{})
		tr := w.transport(testpki.Server("dc2", "bob"))
		get := func() { ask(t, tr, http.MethodGet, "/v1/federation-states", "") }
		set := func(leader string) { fake.mu.Lock(); fake.leader = leader; fake.mu.Unlock() }
		for _, step := range []struct {
			leader string
			after  time.Duration
			dials  int // by the two questions
		}{
			{"alice", 0, 1},
			{"", 0, 0},
			{"", astrayAfter - time.Second, 0},
			{"alice", 0, 0},
			{"", astrayAfter, 0},
			{"", astrayAfter, 1},
			{"", time.Second, 2},
			{"alice", 0, 1},
			{"alice", 0, 0},
		} {
			set(step.leader)
			time.Sleep(step.after)
			get()
			synctest.Wait()
			get()
			synctest.Wait()
			if got := strings.Fields(w.dialled()); len(got) != step.dials {
				t.Errorf("with the leader %q, %v later: dialled %v", step.leader, step.after, got)
			}
		}
		fake.fail(&store.NotLeaderError{})
		set("")
		ask(t, tr, http.MethodPut, "/v1/federation-state/dc2/servers/bob", entryJSON(t, bob()))
		w.dialled()
		time.Sleep(astrayAfter)
		if got := ask(t, tr, http.MethodPut, "/v1/federation-state/dc2/servers/bob", entryJSON(t, bob())); got.code != http.StatusServiceUnavailable {
			t.Errorf("%+v", got)
		}
		synctest.Wait()
		get()
		if got := strings.Fields(w.dialled()); len(got) != 1 {
			t.Errorf("after a write that nobody takes: dialled %v", got)
		}
	})
}

// A real store serves the same paths.
func TestRealStore(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		s, err := store.Open(store.Options{Datacenter: "dc1", Node: "alice", Address: "10.71.0.11:8443", Expect: 1})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		w.wg.Go(func() { _ = s.Run(ctx) })
		defer cancel()
		w.serve("alice", s, APIOptions{})
		c := w.client(testpki.Server("dc2", "bob"), false)
		for s.State().Store() == "" {
			<-s.Changed()
		}
		time.Sleep(time.Second)
		lease, err := c.Register(t.Context(), *bob())
		if err != nil || lease.TTL != 30*time.Second || lease.Index == 0 {
			t.Fatalf("%+v, %v", lease, err)
		}
		got := ask(t, w.transport(testpki.Server("dc2", "bob")), http.MethodGet, "/v1/federation-state/dc2", "")
		if !strings.Contains(got.body, `"advertise":"127.77.2.1"`) || got.header.Get(IndexHeader) != fmt.Sprint(lease.Index) {
			t.Errorf("%+v", got)
		}
		if err := c.Remove(t.Context(), bob().Key()); err != nil {
			t.Error(err)
		}
		if _, err := c.Register(t.Context(), *bob()); !left(err) {
			t.Errorf("registered after it had left: %v", err)
		}
	})
}
