package locator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/catalog"
)

func key(dc, node string) catalog.Key { return catalog.Key{Datacenter: dc, Node: node} }

const (
	amySidecar = "10.71.0.12:8443"
	bobSidecar = "10.72.0.11:8443"
	danSidecar = "10.74.0.11:8443"
)

// sites is a catalog of alice in dc1: a sibling, and a peer for each mode.
func sites() *catalog.Snapshot {
	return &catalog.Snapshot{
		Self:     key("dc1", "alice"),
		Gateways: []string{gw1, gw2},
		Peers: []catalog.Peer{
			{Key: key("dc1", "amy"), Advertise: netip.MustParseAddr("127.77.1.2"), Address: amySidecar},
			{Key: key("dc2", "bob"), Address: bobSidecar}, // an address alone does not make it direct
			{Key: key("dc3", "carl")},
			{Key: key("dc4", "dan"), Address: danSidecar},
			{Key: key("dc5", "eve")},
		},
		Datacenters: []catalog.Datacenter{
			{Name: "dc2", Mode: catalog.ModeLocal, Gateways: []string{"10.72.0.1:8443"}},
			{Name: "dc3", Mode: catalog.ModeRemote, Gateways: []string{gw3}},
			{Name: "dc4", Mode: catalog.ModeDirect},
		},
	}
}

func newLocator(t *testing.T, s *catalog.Snapshot, n *network) (*Locator, *catalog.Catalog) {
	t.Helper()
	c := catalog.New(s)
	l, err := New(c, Options{Dial: n.dial, Resolver: &names{}})
	if err != nil {
		t.Fatal(err)
	}
	return l, c
}

// run runs a locator until the returned function is called.
func run(t *testing.T, l *Locator) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- l.Run(ctx) }()
	synctest.Wait()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func reach(t *testing.T, l *Locator, to catalog.Key) Path {
	t.Helper()
	c, path, err := l.Dial(t.Context(), to)
	if err != nil {
		t.Fatalf("Dial(%s): %v", to, err)
	}
	_ = c.Close()
	return path
}

func TestPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw3: answers, amySidecar: answers, danSidecar: answers})
		l, _ := newLocator(t, sites(), n)
		for _, c := range []struct {
			to   catalog.Key
			want Path
		}{
			{key("dc1", "amy"), Path{KindDirect, "", amySidecar}},
			{key("dc2", "bob"), Path{KindLocal, gw1, gw1}},
			{key("dc3", "carl"), Path{KindRemote, gw3, gw3}},
			{key("dc4", "dan"), Path{KindDirect, "", danSidecar}},
			{key("dc5", "eve"), Path{KindLocal, gw1, gw1}}, // no datacenter block
		} {
			if got := l.Path(c.to); got != (Path{Kind: c.want.Kind}) {
				t.Errorf("%s: path before the first dial: %+v", c.to, got)
			}
			if got := reach(t, l, c.to); got != c.want {
				t.Errorf("%s: dialled %+v, want %+v", c.to, got, c.want)
			}
			if got := l.Path(c.to); got != c.want {
				t.Errorf("%s: path %+v, want %+v", c.to, got, c.want)
			}
		}
		for kind, want := range map[string]float64{KindDirect: 2, KindLocal: 2, KindRemote: 1} {
			if got := testutil.ToFloat64(l.o.Metrics.dials.WithLabelValues(kind, "ok")); got != want {
				t.Errorf("%v dials of kind %s are counted, want %v", got, kind, want)
			}
		}
	})
}

func TestNoPath(t *testing.T) {
	s := sites()
	s.Gateways = nil
	s.Datacenters[1].Gateways = nil
	s.Peers[3].Address = ""
	n := newNetwork(map[string]way{})
	l, _ := newLocator(t, s, n)
	for to, want := range map[catalog.Key]string{
		key("dc2", "bob"):  `no gateway of datacenter "dc1" is known`,
		key("dc3", "carl"): `no gateway of datacenter "dc3" is known`,
		key("dc4", "dan"):  "no address of a sidecar is known",
	} {
		c, path, err := l.Dial(t.Context(), to)
		if err == nil || c != nil || path != (Path{}) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), to.String()) {
			t.Errorf("Dial(%s) = %v, %+v, %v; want %q", to, c, path, err, want)
		}
		if path := l.Path(to); path != (Path{}) {
			t.Errorf("%s has the path %+v", to, path)
		}
	}
	for _, to := range []catalog.Key{key("dc9", "bob"), key("dc9", ""), key("dc1", "bob"), key("dc4", "bob"), {}} {
		if _, _, err := l.Dial(t.Context(), to); !errors.Is(err, ErrUnknownPeer) || !strings.Contains(err.Error(), "peer block") {
			t.Errorf("Dial(%s): %v", to, err)
		}
	}
	if dialled := n.took(); len(dialled) > 0 {
		t.Errorf("dialled %v", dialled)
	}
	if _, err := New(nil, Options{}); err == nil {
		t.Error("New without a catalog")
	}
}

func TestFailedDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := newLocator(t, sites(), newNetwork(map[string]way{}))
		c, path, err := l.Dial(t.Context(), key("dc2", "bob"))
		if err == nil || c != nil || path != (Path{}) {
			t.Errorf("Dial = %v, %+v, %v", c, path, err)
		}
		if got := testutil.ToFloat64(l.o.Metrics.dials.WithLabelValues(KindLocal, "failed")); got != 1 {
			t.Errorf("%v failed dials are counted", got)
		}
		if got := l.Path(key("dc2", "bob")); got != (Path{Kind: KindLocal}) {
			t.Errorf("path %+v", got)
		}
	})
}

// A gateway that takes connections and leads nowhere is avoided for the peer
// that was not reached through it, for a while, and for no other.
func TestReportAvoidsAGatewayForOnePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: answers, amySidecar: answers})
		l, _ := newLocator(t, sites(), n)
		bob, eve := key("dc2", "bob"), key("dc5", "eve")
		used := func(to catalog.Key) []string {
			var got []string
			for range 100 {
				if g := reach(t, l, to).Gateway; !slices.Contains(got, g) {
					got = append(got, g)
				}
			}
			slices.Sort(got)
			return got
		}
		l.Report(bob, Path{KindLocal, gw1, gw1}, errors.New("no handshake"))
		if got := used(bob); !slices.Equal(got, []string{gw2}) {
			t.Errorf("bob is reached through %v", got)
		}
		if got := used(eve); !slices.Equal(got, []string{gw1, gw2}) {
			t.Errorf("eve is reached through %v", got)
		}
		time.Sleep(avoidFor)
		if got := used(bob); !slices.Equal(got, []string{gw1, gw2}) {
			t.Errorf("bob is reached through %v after %v", got, avoidFor)
		}
		l.Report(bob, Path{KindLocal, gw1, gw1}, errors.New("no handshake"))
		l.Report(bob, Path{KindLocal, gw1, gw1}, nil)
		if got := used(bob); !slices.Equal(got, []string{gw1, gw2}) {
			t.Errorf("bob is reached through %v although the gateway works", got)
		}
		l.Report(key("dc1", "amy"), Path{KindDirect, "", amySidecar}, errors.New("no handshake")) // there is no other way
		reach(t, l, key("dc1", "amy"))
		l.Report(key("dc9", "zoe"), Path{KindLocal, gw1, gw1}, errors.New("gone"))
		if len(l.avoid) > 0 {
			t.Errorf("remembers %v", l.avoid)
		}
	})
}

// answeredError is of the far side's own making, or not.
type answeredError bool

func (e answeredError) Error() string  { return "refused" }
func (e answeredError) Answered() bool { return bool(e) }

// A peer that refuses was reached: the gateway is neither avoided for it nor
// forgiven for what it did before. Of any server another one may not refuse.
func TestReportOfAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := newLocator(t, federated(), newNetwork(allOf(answers)))
		bob, through := key("dc2", "bob"), Path{KindLocal, gw1, gw1}
		avoided := func(to catalog.Key) int {
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.avoided(to))
		}
		refusal := fmt.Errorf("handshake: %w", answeredError(true))
		l.Report(bob, through, refusal)
		if avoided(bob) != 0 {
			t.Error("the gateway is avoided for a peer that refuses")
		}
		l.Report(bob, through, answeredError(false))
		l.Report(bob, through, refusal)
		if avoided(bob) != 1 {
			t.Error("the gateway is not avoided although the refusal was its own")
		}
		here := key("dc1", "")
		l.Report(here, Path{KindDirect, amySidecar, amySidecar}, refusal)
		if avoided(here) != 1 {
			t.Error("of any server the one that refuses is not avoided")
		}
	})
}

func TestFollowsTheCatalog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: answers, gw3: answers, bobSidecar: answers})
		l, c := newLocator(t, sites(), n)
		defer run(t, l)()
		bob := key("dc2", "bob")
		reach(t, l, bob)
		l.Report(bob, Path{KindLocal, gw1, gw1}, errors.New("no handshake"))
		l.pools[poolKey{kind: KindLocal, datacenter: "dc1"}].Report(gw2, errors.New("down"))

		next := sites() // gw1 goes, gw2 stays and keeps what is known of it; dc3 goes
		next.Gateways = []string{gw2, gw3}
		next.Datacenters = next.Datacenters[:1]
		c.Store(next)
		synctest.Wait()
		want := []GatewayStatus{{gw2, "dc1", false, "down", false, KindLocal}, {gw3, "dc1", true, "", false, KindLocal}}
		if got := l.Gateways(); !slices.Equal(got, want) {
			t.Errorf("gateways %+v, want %+v", got, want)
		}
		if got := reach(t, l, bob).Gateway; got != gw3 {
			t.Errorf("bob is reached through %s", got)
		}

		next = sites() // dc2 becomes direct
		next.Datacenters[0].Mode = catalog.ModeDirect
		c.Store(next)
		if got := l.Path(bob); got != (Path{Kind: KindDirect}) {
			t.Errorf("path %+v", got)
		}
		if got := reach(t, l, bob); got != (Path{KindDirect, "", bobSidecar}) {
			t.Errorf("bob is reached by %+v", got)
		}

		next = sites() // bob goes
		next.Peers = slices.Delete(next.Peers, 1, 2)
		c.Store(next)
		l.Gateways()
		if len(l.last) > 0 || len(l.avoid) > 0 {
			t.Errorf("remembers %v and %v", l.last, l.avoid)
		}
		next = sites() // and so does dc2
		next.Peers, next.Datacenters = slices.Delete(next.Peers, 1, 2), nil
		c.Store(next)
		if _, _, err := l.Dial(t.Context(), bob); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("Dial: %v", err)
		}
	})
}

// The gateway of the newest dial is told only as long as it is one.
func TestPathForgetsAGatewayThatLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw3: answers})
		l, c := newLocator(t, sites(), n)
		bob := key("dc2", "bob")
		if got := reach(t, l, bob).Gateway; got != gw1 {
			t.Fatalf("bob is reached through %s", got)
		}
		next := sites()
		next.Gateways = []string{gw3}
		c.Store(next)
		if got := l.Path(bob); got != (Path{Kind: KindLocal}) {
			t.Errorf("path %+v", got)
		}
	})
}

// Gateways are probed, those that come later too, and those that left are not;
// sidecars are not.
func TestRunProbesGateways(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: refuses, gw3: answers})
		l, c := newLocator(t, sites(), n)
		stop := run(t, l)
		probed := func() []string {
			n.took()
			time.Sleep(30 * time.Second)
			dialled := n.took()
			slices.Sort(dialled)
			return slices.Compact(dialled)
		}
		if got := probed(); !slices.Equal(got, []string{gw1, gw2, gw3}) {
			t.Errorf("probed %v", got)
		}
		want := []GatewayStatus{
			{gw1, "dc1", true, "", false, KindLocal},
			{gw2, "dc1", false, "dial tcp: connection refused", false, KindLocal},
			{gw3, "dc3", true, "", false, KindRemote},
		}
		if got := l.Gateways(); !slices.Equal(got, want) {
			t.Errorf("gateways %+v, want %+v", got, want)
		}
		next := sites()
		next.Gateways = nil
		next.Datacenters = append(next.Datacenters, catalog.Datacenter{Name: "dc5", Mode: catalog.ModeRemote, Gateways: []string{gw2}})
		c.Store(next)
		if got := probed(); !slices.Equal(got, []string{gw2, gw3}) {
			t.Errorf("probed %v after a change", got)
		}
		stop()
		c.Store(sites())
		l.Gateways() // makes the pools, and runs none
		if got := probed(); len(got) > 0 {
			t.Errorf("probed %v after the end", got)
		}
	})
}

// A pool that is not probed costs no goroutine, nor does one that left.
func TestGoroutinesOfRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sites()
		for i := range 500 {
			s.Peers = append(s.Peers, catalog.Peer{Key: key("dc1", fmt.Sprint(i)), Address: amySidecar})
			s.Datacenters = append(s.Datacenters, catalog.Datacenter{Name: fmt.Sprint(i), Mode: catalog.ModeRemote, Gateways: []string{gw3}})
		}
		l, c := newLocator(t, s, newNetwork(map[string]way{gw3: answers}))
		before := runtime.NumGoroutine()
		defer run(t, l)()
		if more := runtime.NumGoroutine() - before; more < 500 || more > 550 {
			t.Errorf("%d goroutines for 500 pools of gateways", more)
		}
		c.Store(sites())
		synctest.Wait()
		if more := runtime.NumGoroutine() - before; more > 50 {
			t.Errorf("%d goroutines after they left", more)
		}
	})
}

// While one peer's path is silent, others are dialled as ever.
func TestOneSilentPathHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw3: silent, amySidecar: silent})
		l, _ := newLocator(t, sites(), n)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		for _, to := range []catalog.Key{key("dc3", "carl"), key("dc1", "amy")} {
			go func() {
				_, _, err := l.Dial(ctx, to)
				ended <- err
			}()
		}
		synctest.Wait()
		began := time.Now()
		reach(t, l, key("dc2", "bob"))
		l.Gateways()
		l.Path(key("dc3", "carl"))
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		cancel()
		for range 2 {
			if err := <-ended; err == nil {
				t.Error("connected to nobody")
			}
		}
	})
}
