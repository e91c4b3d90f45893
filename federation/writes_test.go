package federation

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/certs"
	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/testpki"
)

func entryJSON(t testing.TB, r *state.Registration) string {
	t.Helper()
	var v any = r.Server
	if r.Gateway != nil {
		v = r.Gateway
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// An API with a store behind it, and what it counts.
func writing(t *testing.T, w *world) (*fakeStore, *Metrics) {
	t.Helper()
	fake, m := newFakeStore(stateOf(t, "S", alice(), bob(), gw1())), NewMetrics(nil)
	w.serve("alice", fake, APIOptions{Metrics: m})
	return fake, m
}

func (m *Metrics) count(reason string) int {
	return int(testutil.ToFloat64(m.refusals.WithLabelValues(reason)))
}

// A request of somebody's.
type request struct {
	who          testpki.Option
	method, path string
	asked        string // of the store; "" where it is refused, "-" where there is no such path
}

func requests() []request {
	server, gateway := testpki.Server, testpki.Gateway
	const (
		put, del          = http.MethodPut, http.MethodDelete
		aliceAt, bobAt    = "/v1/federation-state/dc1/servers/alice", "/v1/federation-state/dc2/servers/bob"
		gw1At             = "/v1/federation-state/dc1/gateways/gw1"
		peerAt, promiseAt = "/v1/federation-peers/amy", "/v1/federation-store/promise"
		greetAt           = "/v1/federation-store"
	)
	return []request{
		{server("dc1", "alice"), put, aliceAt, "register dc1/alice"},
		{server("dc2", "bob"), put, bobAt, "register dc2/bob"},
		{gateway("dc1", "gw1"), put, gw1At, "register gateway dc1/gw1"},
		{server("dc2", "alice"), put, aliceAt, ""}, // another datacenter's
		{server("dc1", "bob"), put, bobAt, ""},     // the primary's servers do not write for others
		{server("dc1", "amy"), put, aliceAt, ""},   // a sibling's
		{server("dc1", ""), put, aliceAt, ""},      // a certificate of no node
		{server("dc1", ""), put, "/v1/federation-state/dc1/servers/", "-"},
		{gateway("dc1", "alice"), put, aliceAt, ""}, // a gateway a server's
		{server("dc1", "gw1"), put, gw1At, ""},      // a server a gateway's
		{gateway("dc2", "gw1"), put, gw1At, ""},
		{server("dc2", "bob"), put, "/v1/federation-state/DC2/servers/bob", ""},
		{server("dc2", "bob"), put, "/v1/federation-state/dc1%2F..%2Fdc2/servers/bob", ""},
		{server("dc2", "bob"), del, bobAt, "remove [dc2/bob] true"},
		{server("dc1", "alice"), del, bobAt, "remove [dc2/bob] true"}, // by a server of the primary
		{server("dc1", "amy"), del, gw1At, "remove [gateway dc1/gw1] true"},
		{gateway("dc1", "gw1"), del, gw1At, "remove [gateway dc1/gw1] true"},
		{gateway("dc1", "gw1"), del, aliceAt, ""},
		{gateway("dc1", "gw1"), del, bobAt, ""}, // a gateway of the primary is no server
		{server("dc2", "bob"), del, aliceAt, ""},
		{server("dc2", "ben"), del, bobAt, ""},
		{server("dc1", "alice"), del, peerAt, "remove peer amy"},
		{gateway("dc1", "gw1"), del, peerAt, ""},
		{server("dc2", "bob"), del, peerAt, ""},
		{server("dc1", "amy"), http.MethodPost, promiseAt, "promise to 0"},
		{server("dc2", "bob"), http.MethodPost, promiseAt, ""},
		{gateway("dc1", "gw1"), http.MethodPost, promiseAt, ""},
		{server("dc1", "amy"), http.MethodGet, greetAt, "nothing"},
		{server("dc2", "bob"), http.MethodGet, greetAt, ""},
		{gateway("dc1", "gw1"), http.MethodGet, greetAt, ""},
	}
}

// What a client may write its certificate alone decides.
func TestOwner(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake, m := writing(t, w)
		refused := 0
		for _, c := range requests() {
			body := "{}"
			for _, r := range []*state.Registration{alice(), bob(), gw1()} {
				if strings.HasSuffix(c.path, "/"+string(r.Key().Kind)+"/"+r.Key().Name) {
					body = entryJSON(t, r)
				}
			}
			before := fake.State()
			got := ask(t, w.transport(c.who), c.method, c.path, body)
			asked, what := fake.asked(), c.method+" "+c.path
			switch c.asked {
			case "-":
				if got.code != http.StatusNotFound || asked != "" {
					t.Errorf("%s: %d %s, and asked the store to %q", what, got.code, got.body, asked)
				}
			case "":
				refused++
				f := got.failure(t)
				if got.code != http.StatusForbidden || f.Reason != refusedOwner || !strings.Contains(f.Error, "the certificate is of ") || asked != "" || fake.State() != before {
					t.Errorf("%s: %d %s, and asked the store to %q", what, got.code, got.body, asked)
				}
				if n := m.count(refusedOwner); n != refused {
					t.Errorf("%s: counted %d, want %d", what, n, refused)
				}
			case "nothing":
				if got.code != http.StatusOK || !strings.Contains(got.body, `"node":"alice"`) {
					t.Errorf("%s: %d %s", what, got.code, got.body)
				}
			default:
				if got.code != http.StatusOK || asked != c.asked {
					t.Errorf("%s: %d %s, and asked the store to %q, want %q", what, got.code, got.body, asked, c.asked)
				}
			}
		}
	})
}

// Anybody verified may see who keeps the store.
func TestPeers(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake, _ := writing(t, w)
		fake.peers = []store.Peer{{Node: "alice", Address: "10.71.0.11:8443", Voter: true, Leader: true}}
		got := ask(t, w.transport(testpki.Gateway("dc2", "gw2")), http.MethodGet, "/v1/federation-peers", "")
		if got.body != `{"leader":"alice","peers":[{"node":"alice","address":"10.71.0.11:8443","voter":true,"leader":true}]}`+"\n" {
			t.Errorf("%s", got.body)
		}
	})
}

// Who has no certificate that counts writes nothing, and is counted.
func TestNoIdentity(t *testing.T) {
	fake, m := newFakeStore(stateOf(t, "S", alice())), NewMetrics(nil)
	api := NewAPI(fake, APIOptions{Datacenter: "dc1", Domain: "consul", Metrics: m, Identity: func(tls.ConnectionState) (certs.Identity, error) {
		return certs.Identity{}, errors.New("it has run out")
	}})
	for i, want := range []string{"no certificate", "it has run out"} {
		for _, c := range [][2]string{
			{http.MethodPut, "/v1/federation-state/dc1/servers/alice"},
			{http.MethodDelete, "/v1/federation-state/dc1/gateways/gw1"},
			{http.MethodDelete, "/v1/federation-peers/amy"},
			{http.MethodGet, "/v1/federation-store"},
			{http.MethodPost, "/v1/federation-store/promise"},
		} {
			r := httptest.NewRequest(c[0], c[1], strings.NewReader("{}"))
			if i == 1 {
				r.TLS = &tls.ConnectionState{}
			}
			w := httptest.NewRecorder()
			api.ServeHTTP(w, r)
			if w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), want) {
				t.Errorf("%v: %d %s", c, w.Code, w.Body)
			}
		}
	}
	if m.count(refusedCertificate) != 10 || fake.asked() != "" {
		t.Errorf("counted %d, and asked the store to %q", m.count(refusedCertificate), fake.asked())
	}
}

// Whose an entry is, and that it lives, the body does not decide.
func TestEntryIsItsOwners(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake, _ := writing(t, w)
		body := `{"node": "alice", "name": "x", "datacenter": "dc1", "advertise": "127.77.2.1", "address": "10.79.0.11:8443", "version": "9",
			"services": [{"name": "gossip-packet", "kind": "packet", "port": 7946}], "health": "critical", "since": "1999-01-01T00:00:00Z",
			"start": "start-bob", "replaced": "start-x", "unknown": 1}`
		got := ask(t, w.transport(testpki.Server("dc2", "bob")), http.MethodPut, "/v1/federation-state/dc2/servers/bob", body)
		sv, _ := fake.State().Record("dc2").Server("bob")
		if got.code != http.StatusOK || sv.Version != "9" || sv.Health != state.Passing || sv.Replaced != "" || sv.Since.Year() == 1999 {
			t.Errorf("%d %s: %+v", got.code, got.body, sv)
		}
		var lease Lease
		if err := json.Unmarshal([]byte(got.body), &lease); err != nil || lease.TTL != "30s" || lease.Index != fake.State().Index() {
			t.Errorf("lease %s, %v", got.body, err)
		}
		if a, _ := fake.State().Record("dc1").Server("alice"); a.Version != "0.1.0" {
			t.Errorf("alice is %+v", a)
		}
	})
}

func TestInvalidEntries(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake, m := writing(t, w)
		tr := w.transport(testpki.Server("dc2", "bob"))
		good := entryJSON(t, bob())
		bad := []string{
			"", "{", "null", "[]", `"x"`, "{}", strings.Repeat("[", 10000),
			strings.Replace(good, "127.77.2.1", "224.0.0.1", 1), strings.Replace(good, "127.77.2.1", "", 1),
			strings.Replace(good, ":7946", ":0", 1), strings.Replace(good, ":7946", ":70000", 1), strings.Replace(good, `"packet"`, `"raw"`, 1),
			strings.Replace(good, "10.71.0.11:8443", "10.71.0.11", 1), strings.Replace(good, "start-bob", "", 1),
			strings.Replace(good, "start-bob", strings.Repeat("x", 65), 1), strings.Replace(good, "start-bob", `x\u0007`, 1),
			strings.Replace(good, "0.1.0", strings.Repeat("x", maxBody), 1), // more than is read
			strings.Repeat(" ", maxBody) + good,
		}
		for _, body := range bad {
			got := ask(t, tr, http.MethodPut, "/v1/federation-state/dc2/servers/bob", body)
			if f := got.failure(t); got.code != http.StatusBadRequest || f.Reason != refusedInvalid || !strings.HasPrefix(f.Error, "the entry of dc2/bob: ") {
				t.Errorf("%.80s: %d %s", body, got.code, got.body)
			}
		}
		if n := m.count(refusedInvalid); n != len(bad) || fake.asked() != "" {
			t.Errorf("counted %d, want %d, and asked the store to %q", n, len(bad), fake.asked())
		}
		got := ask(t, w.transport(testpki.Server("dc1", "amy")), http.MethodPost, "/v1/federation-store/promise", "["+strings.Repeat(" ", maxBody))
		if got.code != http.StatusBadRequest || fake.asked() != "" {
			t.Errorf("a proposal that is too large: %d %s", got.code, got.body)
		}
	})
}

// What the store says no to, and how a client is told.
func TestStoreSaysNo(t *testing.T) {
	conflict := func(reason string) error {
		return &state.ConflictError{Reason: reason, Key: bob().Key(), Holder: alice().Key(), Detail: "it is alice's"}
	}
	bubble(t, func(t *testing.T, w *world) {
		fake, m := writing(t, w)
		tr := w.transport(testpki.Server("dc2", "bob"))
		for _, c := range []struct {
			err    error
			code   int
			reason string // counted and told
		}{
			{conflict(state.ConflictName), http.StatusConflict, state.ConflictName},
			{conflict(state.ConflictAddress), http.StatusConflict, state.ConflictAddress},
			{conflict(state.ConflictLeft), http.StatusGone, state.ConflictLeft},
			{fmt.Errorf("register: %w", state.ErrFull), http.StatusInsufficientStorage, refusedFull},
			{&store.NotLeaderError{}, http.StatusServiceUnavailable, ""},
			{&store.DiskError{Path: "/x", Err: errors.New("no")}, http.StatusServiceUnavailable, ""},
			{&store.NotLeaderError{Node: "amy.x", Address: "10.71.0.12:8443"}, http.StatusTemporaryRedirect, ""},
		} {
			fake.fail(c.err)
			for _, method := range []string{http.MethodPut, http.MethodDelete} {
				got := ask(t, tr, method, "/v1/federation-state/dc2/servers/bob?x=1", entryJSON(t, bob()))
				f := got.failure(t)
				if got.code != c.code || f.Reason != c.reason || f.Error == "" {
					t.Errorf("%v: %d %s", c.err, got.code, got.body)
				}
				if holder := strings.HasPrefix(f.Error, "it is "); holder != (f.Holder == "dc1/alice") {
					t.Errorf("%v: holder %q", c.err, f.Holder)
				}
				if retry := got.header.Get("Retry-After") != ""; retry != (c.code == http.StatusServiceUnavailable) {
					t.Errorf("%v: %v", c.err, got.header)
				}
				location, leader := got.header.Get("Location"), got.header.Get(LeaderHeader)
				if c.code != http.StatusTemporaryRedirect {
					if location+leader != "" {
						t.Errorf("%v: Location %s", c.err, location)
					}
				} else if location != "https://amy.x.server.dc1.consul/v1/federation-state/dc2/servers/bob?x=1" || leader != "10.71.0.12:8443" {
					t.Errorf("%v: Location %s, leader %s", c.err, location, leader)
				}
			}
			if c.reason != "" && m.count(c.reason) != 2 {
				t.Errorf("%v: counted %d", c.err, m.count(c.reason))
			}
		}
		fake.fail(errors.New("it has promised another"))
		if got := ask(t, w.transport(testpki.Server("dc1", "amy")), http.MethodPost, "/v1/federation-store/promise", "{}"); got.code != http.StatusConflict {
			t.Errorf("a promise that is not given: %d", got.code)
		}
	})
}

// Refusals are told to the log, but not each of many.
func TestRefusalsAreSampled(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		log, logs := observed()
		w.serve("alice", newFakeStore(stateOf(t, "S", alice())), APIOptions{Log: log})
		tr := w.transport(testpki.Server("dc2", "bob"))
		for range 20 {
			ask(t, tr, http.MethodPut, "/v1/federation-state/dc1/servers/alice", "{}")
		}
		if got := lines(logs); got != "federation request refused" {
			t.Errorf("logged %q", got)
		}
	})
}

// Every reason is there from the start, as are the results.
func TestMetricsStartAtZero(t *testing.T) {
	m := NewMetrics(nil)
	if n := testutil.CollectAndCount(m.refusals); n != 7 {
		t.Errorf("%d reasons", n)
	}
	if testutil.CollectAndCount(m.reads) != 2 || testutil.CollectAndCount(m.registrations) != 2 || testutil.CollectAndCount(m.entries) != 4 {
		t.Error("results or entries are missing")
	}
}
