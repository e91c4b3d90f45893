package locator

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/catalog"
)

var errForbidden = errors.New("it is in the own network")

// forbid forbids 10.0.0.0/8.
func forbid(a netip.AddrPort) error {
	if netip.MustParsePrefix("10.0.0.0/8").Contains(a.Addr()) {
		return errForbidden
	}
	return nil
}

// What replicated state alone names is asked about before it is dialled or probed;
// what the configuration names too is not.
func TestForbiddenIsNeverConnectedTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, "[::ffff:10.0.0.1]:8443": answers, far2: answers})
		r := &names{addrs: map[string][]string{"evil.example": {"10.0.0.1", "::ffff:10.0.0.1"}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r, Forbid: forbid})
		foreign := []Endpoint{{gw1, true}, {"[::ffff:10.0.0.1]:8443", true}, {"evil.example:8443", true}}
		p.Set(foreign)
		stop := runPool(t, p)
		_, _, err := p.Dial(t.Context())
		if !errors.Is(err, errForbidden) || strings.Count(err.Error(), "forbidden to replicated state") != 4 {
			t.Errorf("Dial: %v", err)
		}
		time.Sleep(time.Minute)
		if dialled := n.took(); len(dialled) > 0 {
			t.Errorf("dialled %v", dialled)
		}
		for _, e := range p.Status() {
			if e.Healthy || !strings.Contains(e.LastError, errForbidden.Error()) {
				t.Errorf("status %+v", e)
			}
		}
		p.Set(append(slices.Clone(foreign), Endpoint{far2, true}))
		if endpoint, _ := dial(t, p); endpoint != far2 {
			t.Errorf("came out at %s", endpoint)
		}
		n.took()
		p.Set([]Endpoint{{gw1, true}, {gw1, false}}) // the configuration as well, in whatever order
		time.Sleep(2 * time.Second)
		if endpoint, _ := dial(t, p); endpoint != gw1 {
			t.Errorf("came out at %s", endpoint)
		}
		p.Set([]Endpoint{{gw1, false}, {gw1, true}})
		dial(t, p)
		p.Set(foreign[:1]) // and the configuration alone no more
		n.took()
		if _, _, err := p.Dial(t.Context()); !errors.Is(err, errForbidden) {
			t.Errorf("Dial: %v", err)
		}
		if dialled := n.took(); len(dialled) > 0 {
			t.Errorf("dialled %v", dialled)
		}
		stop()
	})
}

// Of a name's addresses those that may be are connected to.
func TestForbiddenAmongOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, far1: answers})
		r := &names{addrs: map[string][]string{"gw": {"10.0.0.1", "192.0.2.1"}, "srv:_gw._tcp.example": {gw1, far1}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r, Forbid: forbid})
		defer runPool(t, p)()
		for _, endpoint := range []string{"gw:8443", "srv:_gw._tcp.example"} {
			p.Set([]Endpoint{{endpoint, true}})
			for range 50 {
				if got, took := dial(t, p); got != endpoint || took != 0 {
					t.Fatalf("came out at %s after %v", got, took)
				}
			}
			time.Sleep(time.Minute)
			wantHealth(t, p, endpoint+" up")
			e := p.endpoints[0]
			if known := p.resolved(e); len(known) != 2 || p.allForbidden(e, known) != "" || p.allForbidden(e, known[:1]) == "" {
				t.Errorf("%s: of %v all are forbidden: %q", endpoint, known, p.allForbidden(e, known))
			}
		}
		if dialled := n.took(); count(dialled, far1) != len(dialled) {
			t.Errorf("dialled %v", dialled)
		}
	})
}

// The locator asks for gateways of replicated state, and for those alone.
func TestLocatorForbids(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw3: answers, amySidecar: answers})
		s := federated()
		s.Gateways = nil
		s.Datacenters[0].Gateways, s.Datacenters[0].Replicated, s.Datacenters[0].Fallback = nil, []string{gw1}, nil
		c := catalog.New(s)
		l, err := New(c, Options{Dial: n.dial, Resolver: &names{}, Forbid: forbid})
		if err != nil {
			t.Fatal(err)
		}
		bob := key("dc2", "bob")
		if _, _, err := l.Dial(t.Context(), bob); !errors.Is(err, errForbidden) {
			t.Errorf("Dial: %v", err)
		}
		if dialled := n.took(); len(dialled) > 0 {
			t.Errorf("dialled %v", dialled)
		}
		reach(t, l, key("dc1", "amy"))
		for _, change := range []func(d *catalog.Datacenter){
			func(d *catalog.Datacenter) { d.Gateways = []string{gw1} },
			func(d *catalog.Datacenter) { d.Fallback = []string{gw1} },
			func(d *catalog.Datacenter) { d.Gateways, d.Mode = []string{gw1}, catalog.ModeRemote },
		} {
			next := federated()
			next.Gateways = nil
			next.Datacenters[0] = catalog.Datacenter{Name: "dc2", Mode: catalog.ModeAuto, Replicated: []string{gw1}}
			change(&next.Datacenters[0])
			c.Store(next)
			if got := reach(t, l, bob); got.Gateway != gw1 {
				t.Errorf("dialled %+v", got)
			}
		}
	})
}

// A service's addresses are tried in the order in which its records have them,
// those that failed last.
func TestServiceIsOneEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const service = "srv:_gw._tcp.example"
		n := newNetwork(map[string]way{gw1: answers, gw2: answers, gw3: answers})
		r := &names{addrs: map[string][]string{service: {gw2, gw1, gw3}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r})
		p.Set(Configured(service))
		through := func(want string) {
			t.Helper()
			n.took()
			for range 20 {
				if endpoint, _ := dial(t, p); endpoint != service {
					t.Fatalf("came out at %s", endpoint)
				}
			}
			if dialled := n.took(); dialled[len(dialled)-1] != want || count(dialled, want) < 20 {
				t.Errorf("dialled %v, want %s", dialled, want)
			}
		}
		through(gw2)
		n.set(gw2, refuses)
		through(gw1)
		n.set(gw1, refuses)
		through(gw3)
		wantHealth(t, p, service+" up")
		if len(r.forgot) > 0 {
			t.Errorf("forgot %v although one worked", r.forgot)
		}
		n.set(gw3, refuses)
		if _, _, err := p.Dial(t.Context()); err == nil {
			t.Error("connected to nobody")
		}
		if !slices.Equal(r.forgot, []string{service}) {
			t.Errorf("forgot %v", r.forgot)
		}
	})
}

// The own datacenter's records lead into its own network, and that is no claim of
// another's.
func TestOwnRecordsAreNotForbidden(t *testing.T) {
	n := newNetwork(map[string]way{gw1: answers})
	c := catalog.New(&catalog.Snapshot{
		Self: catalog.Key{Datacenter: "dc1", Node: "alice"}, Replicated: []string{gw1},
		Datacenters: []catalog.Datacenter{{Name: "dc2", Mode: catalog.ModeAuto, Replicated: []string{"10.0.0.77:8443"}}},
	})
	l, err := New(c, Options{Dial: n.dial, Forbid: forbid})
	if err != nil {
		t.Fatal(err)
	}
	bob := catalog.Key{Datacenter: "dc2", Node: "bob"}
	conn, path, err := l.Dial(t.Context(), bob)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if path.Kind != KindLocal || path.Gateway != gw1 {
		t.Errorf("came out at %+v", path)
	}
	e, err := l.Explain(bob)
	if err != nil || len(e.Candidates) != 2 || e.Candidates[0].Configured || !e.Candidates[0].Replicated || e.Candidates[1].Forbidden == "" {
		t.Errorf("explained as %+v, %v", e, err)
	}
}
