package locator

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"culvert/catalog"
)

// A tier whose gateways all take connections and lead nowhere gives way to the
// next one, for that peer.
func TestReportLeadsToTheNextTier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := federated()
		s.Peers = append(s.Peers, catalog.Peer{Key: key("dc2", "ben")})
		l, _ := newLocator(t, s, newNetwork(allOf(answers)))
		bob, noHandshake := key("dc2", "bob"), errors.New("no handshake")
		var kinds []string
		for range 5 {
			path := reach(t, l, bob)
			kinds = append(kinds, path.Kind)
			l.Report(bob, path, noHandshake)
		}
		want := []string{KindLocal, KindLocal, KindRemote, KindRemote, KindPrimary}
		if !slices.Equal(kinds, want) {
			t.Errorf("dialled %v, want %v", kinds, want)
		}
		if got := l.Path(bob); got.Kind != KindPrimary {
			t.Errorf("path %+v", got)
		}
		ben := key("dc2", "ben")
		for _, gw := range []string{gw1, gw2} {
			l.Report(ben, Path{KindLocal, gw, gw}, noHandshake)
		}
		if got := l.Path(ben); got != (Path{Kind: KindRemote}) {
			t.Errorf("path before the first dial %+v", got)
		}
		l.Report(ben, Path{KindLocal, gw1, gw1}, nil)
		for _, to := range []catalog.Key{bob, ben} { // all are avoided, or not all
			if got := reach(t, l, to); got.Kind != KindLocal {
				t.Errorf("%s: dialled %+v", to, got)
			}
		}
	})
}

// Gateways that take connections and say nothing cost a handshake's whole time
// each. Still the next tier has its turn.
func TestSlowFailuresLeadToTheNextTier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := newLocator(t, federated(), newNetwork(allOf(answers)))
		bob := key("dc2", "bob")
		for i := 0; ; i++ {
			path := reach(t, l, bob)
			if path.Kind == KindPrimary {
				break
			}
			if i == 7 {
				t.Fatal("the last tier was never used")
			}
			time.Sleep(avoidFor + time.Second)
			l.Report(bob, path, errors.New("handshake timeout"))
		}
	})
}

func TestAvoidance(t *testing.T) {
	now := time.Unix(1e9, 0)
	a := avoidance{until: make(map[string]time.Time)}
	for i, c := range []struct {
		after   time.Duration
		gateway string
		want    time.Duration
	}{
		{0, gw1, avoidFor},
		{time.Second, gw1, avoidFor}, // another at the same time
		{avoidFor, gw1, 2 * avoidFor},
		{time.Second, gw2, 4 * avoidFor},
		{avoidFor, gw2, 4 * avoidFor},
		{0, gw3, 8 * avoidFor},
		{avoidMost, gw3, avoidMost},
		{avoidMost, gw1, avoidMost},
		{2*avoidMost - 1, gw2, avoidMost},
		{2 * avoidMost, gw1, avoidFor}, // long ago
	} {
		now = now.Add(c.after)
		if a.failed(c.gateway, now); a.until[c.gateway].Sub(now) != c.want {
			t.Errorf("failure %d: avoided for %v, want %v", i, a.until[c.gateway].Sub(now), c.want)
		}
	}
}

// Any server of another datacenter, and one that the catalog has not heard of,
// are dialled like those that it has.
func TestAnyServerElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(answers))
		n.set(bobSidecar, answers)
		l, c := newLocator(t, federated(), n)
		for _, to := range []catalog.Key{key("dc2", ""), key("dc2", "unheard")} {
			path := reach(t, l, to)
			if path.Kind != KindLocal {
				t.Errorf("%s: dialled %+v", to, path)
			}
			l.Report(to, path, errors.New("no handshake"))
			if again := reach(t, l, to); again.Gateway == path.Gateway {
				t.Errorf("%s: %s was not avoided", to, path.Gateway)
			}
		}
		if len(l.last) != 1 {
			t.Errorf("remembers %v of a peer that is not there", l.last)
		}
		s := federated()
		s.Datacenters[0].Mode = catalog.ModeDirect
		c.Store(s)
		if got := reach(t, l, key("dc2", "bob")); got.Kind != KindDirect {
			t.Errorf("dialled %+v", got)
		}
		if _, _, err := l.Dial(t.Context(), key("dc2", "unheard")); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("Dial: %v", err)
		}
		if got := l.Path(key("dc2", "")); got != (Path{Kind: KindDirect}) {
			t.Errorf("path %+v", got)
		}
		s = federated()
		s.Peers, s.Datacenters = nil, nil
		c.Store(s)
		if _, _, err := l.Dial(t.Context(), key("dc2", "")); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("Dial: %v", err)
		}
		if len(l.last)+len(l.avoid) > 0 {
			t.Errorf("remembers %v and %v", l.last, l.avoid)
		}
	})
}

// Any server of the own datacenter is one of those to join or of the peers.
func TestAnyServerHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{amySidecar: answers, aliceJoin: answers})
		l, c := newLocator(t, federated(), n)
		here := key("dc1", "")
		used := make(map[string]bool)
		for range 100 {
			path := reach(t, l, here)
			if path.Kind != KindDirect || path.Gateway != path.Address {
				t.Fatalf("dialled %+v", path)
			}
			used[path.Gateway] = true
		}
		if len(used) != 2 || !used[amySidecar] || !used[aliceJoin] {
			t.Errorf("used %v", used)
		}
		l.Report(here, Path{KindDirect, amySidecar, amySidecar}, errors.New("no server of ours"))
		for range 50 {
			if got := reach(t, l, here); got != (Path{KindDirect, aliceJoin, aliceJoin}) {
				t.Fatalf("dialled %+v", got)
			}
		}
		if got := l.Path(here); got != (Path{KindDirect, aliceJoin, aliceJoin}) {
			t.Errorf("path %+v", got)
		}
		n.set(aliceJoin, silent)
		if got := reach(t, l, here).Gateway; got != amySidecar {
			t.Errorf("dialled %s", got)
		}
		if _, _, err := l.Dial(t.Context(), key("dc1", "unheard")); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("Dial: %v", err)
		}
		s := federated()
		s.Join, s.Peers = nil, nil
		c.Store(s)
		if _, _, err := l.Dial(t.Context(), here); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("Dial: %v", err)
		}
	})
}

// What is remembered of nodes that the catalog does not bound goes by itself.
func TestUnheardOfPeersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, c := newLocator(t, federated(), newNetwork(nil))
		for i := range 1000 {
			l.Report(key("dc2", fmt.Sprint(i)), Path{KindLocal, gw1, gw1}, errors.New("no such server"))
			time.Sleep(time.Second)
		}
		if got, most := len(l.avoid), int((avoidFor+avoidMost)/time.Second)+1; got > most {
			t.Errorf("remembers %d peers", got)
		}
		kept := len(l.avoid)
		if kept < 10 {
			t.Errorf("remembers %d peers alone", kept)
		}
		c.Store(federated())
		l.Gateways()
		if len(l.avoid) != kept {
			t.Error("a change of the catalog forgave a gateway")
		}
	})
}
