package locator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/catalog"
)

const (
	far1      = "192.0.2.1:8443"  // of dc2, configured
	far2      = "192.0.2.2:8443"  // of dc2, replicated
	primary1  = "192.0.2.10:8443" // fallback
	aliceJoin = "10.71.0.13:8443"
)

// federated is a catalog of alice in dc1 as the federation would make it.
func federated() *catalog.Snapshot {
	return &catalog.Snapshot{
		Self:     key("dc1", "alice"),
		Gateways: []string{gw1, gw2},
		Join:     []string{aliceJoin},
		Peers: []catalog.Peer{
			{Key: key("dc1", "amy"), Address: amySidecar},
			{Key: key("dc1", "ann"), Critical: true},
			{Key: key("dc2", "bob"), Address: bobSidecar},
		},
		Datacenters: []catalog.Datacenter{{
			Name: "dc2", Mode: catalog.ModeAuto,
			Gateways: []string{far1}, Replicated: []string{far2}, Fallback: []string{primary1},
		}},
	}
}

func allOf(w way) map[string]way {
	return map[string]way{gw1: w, gw2: w, far1: w, far2: w, primary1: w}
}

// Each tier is used when those above it fail, and the first one again when it is
// back.
func TestTiersInTurn(t *testing.T) {
	for name, dead := range map[string]way{"refuses": refuses, "silent": silent, "cut off": cutOff} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(allOf(answers))
				l, _ := newLocator(t, federated(), n)
				bob := key("dc2", "bob")
				last := ""
				wants := func(kind string, through ...string) {
					t.Helper()
					began := time.Now()
					path := reach(t, l, bob)
					if path.Kind != kind || !slices.Contains(through, path.Gateway) || path.Address != path.Gateway {
						t.Fatalf("dialled %+v, want %s", path, kind)
					}
					if took := time.Since(began); took > 2*hedgeAfter && kind != last {
						t.Errorf("a tier that is dead cost %v", took)
					}
					if got := l.Path(bob); got != path {
						t.Errorf("path %+v, want %+v", got, path)
					}
					n.took()
					if reach(t, l, bob); len(n.took()) != 1 {
						t.Error("what is known to be dead was tried again")
					}
				}
				if got := l.Path(bob); got != (Path{Kind: KindLocal}) {
					t.Errorf("path before the first dial %+v", got)
				}
				wants(KindLocal, gw1, gw2)
				n.set(gw1, dead)
				n.set(gw2, dead)
				wants(KindRemote, far1, far2)
				n.set(far1, dead)
				n.set(far2, dead)
				wants(KindPrimary, primary1)
				n.set(primary1, dead)
				n.set(gw2, answers)
				last = KindLocal // after all others, since it was down
				wants(KindLocal, gw2)
			})
		})
	}
}

// One that takes part in no tier of its own does not appear, and Dial says what is
// missing where there is none.
func TestTiersThatAreLacking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(answers))
		s := federated()
		s.Gateways = nil
		l, c := newLocator(t, s, n)
		bob := key("dc2", "bob")
		if got := l.Path(bob); got != (Path{Kind: KindRemote}) {
			t.Errorf("path %+v", got)
		}
		if got := reach(t, l, bob); got.Kind != KindRemote {
			t.Errorf("dialled %+v", got)
		}
		s = federated()
		s.Gateways, s.Datacenters[0].Gateways, s.Datacenters[0].Replicated = nil, nil, nil
		c.Store(s)
		if got := reach(t, l, bob); got != (Path{KindPrimary, primary1, primary1}) {
			t.Errorf("dialled %+v", got)
		}
		s = federated()
		s.Gateways, s.Datacenters[0] = nil, catalog.Datacenter{Name: "dc2", Mode: catalog.ModeAuto}
		c.Store(s)
		want := `no gateway of datacenter "dc1" or "dc2" is known`
		if _, _, err := l.Dial(t.Context(), bob); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Dial: %v; want %q", err, want)
		}
		if got := l.Path(bob); got != (Path{}) {
			t.Errorf("path %+v", got)
		}
	})
}

// All have refused: every address was tried once, in the order of the tiers.
func TestAllTiersRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(refuses))
		l, _ := newLocator(t, federated(), n)
		_, _, err := l.Dial(t.Context(), key("dc2", "bob"))
		if err == nil {
			t.Fatal("connected to nobody")
		}
		dialled := n.took()
		if len(dialled) != 5 {
			t.Fatalf("dialled %v", dialled)
		}
		slices.Sort(dialled[:2])
		slices.Sort(dialled[2:4])
		if want := []string{gw1, gw2, far1, far2, primary1}; !slices.Equal(dialled, want) {
			t.Errorf("dialled %v, want %v", dialled, want)
		}
		for _, gw := range dialled {
			if !strings.Contains(err.Error(), gw) {
				t.Errorf("the error does not name %s: %v", gw, err)
			}
		}
		n.took()
		_, _, _ = l.Dial(t.Context(), key("dc2", "bob")) // now the local ones come last
		if dialled = n.took(); dialled[2] != primary1 || !slices.Contains([]string{gw1, gw2}, dialled[4]) {
			t.Errorf("dialled %v", dialled)
		}
	})
}

// However many addresses are dead and silent, those of the configuration have
// their turn soon.
func TestManySilentAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(silent))
		n.set(primary1, answers)
		s := federated()
		for i := range 100 {
			dead := fmt.Sprintf("198.51.100.%d:8443", i)
			n.set(dead, silent)
			s.Datacenters[0].Replicated = append(s.Datacenters[0].Replicated, dead)
		}
		l, _ := newLocator(t, s, n)
		began := time.Now()
		if got := reach(t, l, key("dc2", "bob")); got.Kind != KindPrimary {
			t.Errorf("dialled %+v", got)
		}
		if took := time.Since(began); took > startAll {
			t.Errorf("took %v", took)
		}
	})
}

// Who is overtaken within less than the time that an answer may take is not
// judged, however little time the number of candidates leaves each.
func TestOvertakenSoonIsNoVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{})
		var endpoints []string
		for i := range 40 {
			endpoints = append(endpoints, fmt.Sprintf("10.0.1.%d:1", i))
			n.set(endpoints[i], slowly(200*time.Millisecond))
		}
		n.set(endpoints[7], answers)
		p := newPool(n, endpoints...)
		for range 20 {
			dial(t, p)
		}
		for _, e := range p.Status() {
			if !e.Healthy {
				t.Errorf("%s is down: %s", e.Endpoint, e.LastError)
			}
		}
	})
}

// before tells by the rules, as they are written and not as they are computed,
// whether one endpoint has to be tried before another.
func before(a, b entrant, tiers []tier, avoid map[string]time.Time) bool {
	last := func(e entrant) bool {
		return !e.known.Healthy && len(tiers) > 1 && tiers[e.tier].kind == KindLocal
	}
	avoided := func(e entrant) bool { return avoid[e.known.Endpoint].After(time.Now()) }
	switch {
	case last(a) != last(b):
		return last(b)
	case a.known.Healthy != b.known.Healthy:
		return a.known.Healthy
	case avoided(a) != avoided(b):
		return avoided(b)
	}
	return a.tier < b.tier
}

func TestOrderOfTiers(t *testing.T) {
	kinds := []string{KindLocal, KindRemote, KindPrimary}
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		var tiers []tier
		first := make(map[string]int) // by address, the uppermost tier that has it
		avoid := make(map[string]time.Time)
		for i := range 1 + r.IntN(3) {
			p := newPool(newNetwork(nil))
			var endpoints []Endpoint
			for range r.IntN(5) {
				address := fmt.Sprintf("10.0.0.%d:1", r.IntN(10))
				endpoints = append(endpoints, Endpoint{address, r.IntN(2) == 0})
				if _, ok := first[address]; !ok {
					first[address] = i
				}
				switch r.IntN(6) {
				case 0:
					avoid[address] = time.Now().Add(time.Minute)
				case 1:
					avoid[address] = time.Now().Add(-time.Minute) // over
				default:
				}
			}
			p.Set(endpoints)
			for _, e := range endpoints {
				if r.IntN(3) == 0 {
					p.Report(e.Address, errors.New("down"))
				}
			}
			tiers = append(tiers, tier{kind: kinds[i], pool: p})
		}
		got := make(map[string]int)
		order := order(tiers, avoid)
		for i, e := range order {
			got[e.known.Endpoint] = e.tier
			for _, later := range order[i+1:] {
				if before(later, e, tiers, avoid) {
					t.Fatalf("seed %d: %+v comes before %+v", seed, e.known, later.known)
				}
			}
		}
		if len(order) != len(first) || !maps.Equal(got, first) {
			t.Fatalf("seed %d: order %v, want each of %v once", seed, got, first)
		}
	}
}

// Two choices go for each tier.
func TestTheBetterOfTwoInEachTier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(answers))
		n.set(gw1, refuses)
		n.set(gw2, refuses)
		n.set(far1, slowly(100*time.Millisecond))
		n.set(far2, slowly(10*time.Millisecond))
		l, _ := newLocator(t, federated(), n)
		for range 20 {
			reach(t, l, key("dc2", "bob"))
		}
		for range 50 {
			if got := reach(t, l, key("dc2", "bob")); got.Gateway != far2 {
				t.Fatalf("dialled %+v", got)
			}
		}
		l.pools[localKey(l.seen)].Report(gw1, nil)
		for range 50 { // also where its tier is not the first one
			if got := outline(t, l, key("dc2", "bob"))[1]; !strings.Contains(got, far2) {
				t.Fatalf("the second one is %s", got)
			}
		}
	})
}

// Replicated addresses that led nowhere do not keep the configured one of their
// tier waiting.
func TestConfiguredComesBeforeDoubtful(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := federated()
		s.Gateways = nil
		for i := range 20 {
			s.Datacenters[0].Replicated = append(s.Datacenters[0].Replicated, fmt.Sprintf("198.51.100.%d:8443", i))
		}
		n := newNetwork(allOf(answers))
		for _, gw := range s.Datacenters[0].Replicated {
			n.set(gw, answers)
		}
		l, _ := newLocator(t, s, n)
		bob := key("dc2", "bob")
		for range 2 {
			path := reach(t, l, bob)
			if path.Gateway == far1 {
				return
			}
			l.Report(bob, path, errors.New("no handshake"))
		}
		if got := reach(t, l, bob); got.Gateway != far1 {
			t.Errorf("dialled %+v after two replicated ones had led nowhere", got)
		}
	})
}

// Replicated state adds to what is configured and takes nothing away.
func TestUnion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := federated()
		s.Datacenters[0].Replicated = []string{far2, far1, primary1}
		l, c := newLocator(t, s, newNetwork(allOf(answers)))
		local := []GatewayStatus{{gw1, "dc1", true, "", false, KindLocal}, {gw2, "dc1", true, "", false, KindLocal}}
		want := append(slices.Clone(local),
			GatewayStatus{far1, "dc2", true, "", true, KindRemote},
			GatewayStatus{far2, "dc2", true, "", true, KindRemote},
			GatewayStatus{primary1, "dc2", true, "", true, KindRemote})
		if got := l.Gateways(); !slices.Equal(got, want) {
			t.Errorf("gateways %+v, want %+v", got, want)
		}
		s = federated()
		s.Datacenters[0].Replicated = nil
		c.Store(s)
		want = append(slices.Clone(local),
			GatewayStatus{far1, "dc2", true, "", false, KindRemote},
			GatewayStatus{primary1, "dc2", true, "", false, KindPrimary})
		if got := l.Gateways(); !slices.Equal(got, want) {
			t.Errorf("gateways %+v, want %+v", got, want)
		}
		s = federated()
		s.Datacenters[0].Mode = catalog.ModeRemote
		c.Store(s)
		want = append(slices.Clone(local),
			GatewayStatus{far1, "dc2", true, "", false, KindRemote},
			GatewayStatus{far2, "dc2", true, "", true, KindRemote})
		if got := l.Gateways(); !slices.Equal(got, want) {
			t.Errorf("gateways %+v, want %+v", got, want)
		}
	})
}

// A local gateway that comes back is used within a second although the name of
// another tier cannot be looked up.
func TestSlowNameHoldsUpNoRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent})
		s := federated()
		s.Gateways, s.Datacenters[0].Gateways, s.Datacenters[0].Replicated = []string{gw1}, nil, nil
		s.Datacenters[0].Fallback = []string{"unknown.example:8443"}
		l, _ := newLocator(t, s, n)
		time.AfterFunc(5*time.Second, func() { n.set(gw1, answers) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, _, err := l.Dial(ctx, key("dc2", "bob")); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 5*time.Second+attemptTimeout+hedgeAfter {
			t.Errorf("connected after %v", took)
		}
	})
}

// A catalog of many datacenters costs no probes of those that are not dialled.
func TestTiersAreProbedOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(answers))
		l, _ := newLocator(t, federated(), n)
		defer run(t, l)()
		probed := func(d time.Duration) []string {
			n.took()
			time.Sleep(d)
			dialled := n.took()
			slices.Sort(dialled)
			return slices.Compact(dialled)
		}
		if got := probed(time.Hour); !slices.Equal(got, []string{gw1, gw2}) {
			t.Errorf("probed %v", got)
		}
		n.set(gw1, refuses)
		n.set(gw2, refuses)
		time.Sleep(20 * time.Second)
		if got := reach(t, l, key("dc2", "bob")); got.Kind != KindRemote {
			t.Errorf("dialled %+v", got)
		}
		if got := probed(inUse - time.Minute); !slices.Equal(got, []string{gw1, gw2, far1, far2}) {
			t.Errorf("probed %v while it was in use", got)
		}
		n.set(far1, refuses) // is noticed while in use, and its return at any time
		time.Sleep(20 * time.Second)
		time.Sleep(inUse)
		if got := probed(time.Minute); !slices.Equal(got, []string{gw1, gw2, far1}) {
			t.Errorf("probed %v after the use", got)
		}
		n.took()
		time.Sleep(100 * time.Second)
		if probes := count(n.took(), far1); probes < 9 || probes > 12 {
			t.Errorf("%d probes in 100 s of what is down and not in use", probes)
		}
		n.set(far1, answers)
		time.Sleep(12 * time.Second)
		if got := probed(time.Minute); !slices.Equal(got, []string{gw1, gw2}) {
			t.Errorf("probed %v", got)
		}
	})
}
