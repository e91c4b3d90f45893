package locator

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/catalog"
)

// outline is each candidate as "address reason".
func outline(t *testing.T, l *Locator, to catalog.Key) (got []string) {
	t.Helper()
	e, err := l.Explain(to)
	if err != nil {
		t.Fatalf("Explain(%s): %v", to, err)
	}
	for _, c := range e.Candidates {
		got = append(got, fmt.Sprintf("%d %s %s: %s", c.Tier, c.Kind, c.Address, c.Reason))
	}
	return got
}

func TestExplain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const service = "srv:_gw._tcp.dc2.example"
		n := newNetwork(allOf(answers))
		s := federated()
		s.Datacenters[0].Replicated = []string{far2, "10.0.0.66:8443"}
		s.Datacenters[0].Fallback = []string{service}
		r := &names{addrs: map[string][]string{service: {primary1}}}
		l, err := New(catalog.New(s), Options{Dial: n.dial, Resolver: r, Forbid: forbid})
		if err != nil {
			t.Fatal(err)
		}
		bob := key("dc2", "bob")
		reach(t, l, bob)
		l.pools[localKey(l.seen)].Report(gw1, nil)
		l.pools[localKey(l.seen)].Report(gw2, errors.New("connection refused"))
		down := time.Now().UTC().Format(time.RFC3339)
		time.Sleep(time.Minute)
		l.Report(bob, Path{KindRemote, far2, far2}, errors.New("no handshake"))
		until := time.Now().Add(avoidFor)
		n.took()
		want := []string{
			"1 local " + gw1 + ": healthy local gateway",
			"2 remote " + far1 + ": gateway of dc2, not tried yet",
			"2 remote 10.0.0.66:8443: gateway of dc2 that is never connected to: 10.0.0.66:8443 is forbidden to replicated state: it is in the own network",
			"3 primary " + service + ": fallback gateway, not tried yet",
			"2 remote " + far2 + ": healthy gateway of dc2, but dc2/bob was not reached through it: avoided until " + until.UTC().Format(time.RFC3339),
			"1 local " + gw2 + ": local gateway, down since " + down + ", tried last",
		}
		got := outline(t, l, bob)
		if !slices.Equal(got, want) {
			t.Errorf("explained\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for range 20 { // nothing is alike here, so nothing is left to chance
			if again := outline(t, l, bob); !slices.Equal(again, got) {
				t.Fatalf("explained\n%s\nand then\n%s", strings.Join(got, "\n"), strings.Join(again, "\n"))
			}
		}
		e, err := l.Explain(bob)
		if err != nil || e.Datacenter != "dc2" || e.Node != "bob" || e.Mode != catalog.ModeAuto {
			t.Errorf("Explain = %+v, %v", e, err)
		}
		for i, c := range e.Candidates {
			wantResolved := []netip.AddrPort{netip.MustParseAddrPort(primary1)}
			if i != 3 {
				wantResolved[0] = netip.MustParseAddrPort(c.Address)
			}
			if !slices.Equal(c.Resolved, wantResolved) {
				t.Errorf("%s is resolved as %v", c.Address, c.Resolved)
			}
			if c.Replicated != (i == 2 || i == 4) || c.Configured == c.Replicated || c.Healthy != (i != 5) || (c.Forbidden != "") != (i == 2) {
				t.Errorf("candidate %+v", c)
			}
			if avoided := !c.AvoidedUntil.IsZero(); avoided != (i == 4) || avoided && !c.AvoidedUntil.Equal(until) {
				t.Errorf("%s is avoided until %v", c.Address, c.AvoidedUntil)
			}
			if (c.LastError == "connection refused") != (i == 5) {
				t.Errorf("%s has the last error %q", c.Address, c.LastError)
			}
		}
		if dialled := n.took(); len(dialled) > 0 {
			t.Errorf("explaining dialled %v", dialled)
		}
		text, err := json.Marshal(e)
		if err != nil || !strings.Contains(string(text), `"resolved":["192.0.2.10:8443"]`) || strings.Count(string(text), "avoided_until") != 1 {
			t.Errorf("as JSON %s, %v", text, err)
		}
	})
}

// What is explained is what a dial does.
func TestExplanationsComeTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(allOf(refuses))
		l, _ := newLocator(t, federated(), n)
		for range 20 {
			e, err := l.Explain(key("dc2", "bob"))
			if err != nil {
				t.Fatal(err)
			}
			kinds := make(map[string]string)
			for _, c := range e.Candidates {
				kinds[c.Address] = c.Kind
			}
			_, _, _ = l.Dial(t.Context(), key("dc2", "bob"))
			dialled := n.took()
			if len(dialled) != len(e.Candidates) {
				t.Fatalf("dialled %v, explained %+v", dialled, e.Candidates)
			}
			for i, address := range dialled {
				if c := e.Candidates[i]; kinds[address] != c.Kind {
					t.Errorf("%s was dialled in place of %+v", address, c)
				}
			}
		}
	})
}

func TestExplainOtherModes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sites()
		s.Gateways = []string{"gw.example:8443"}
		l, _ := newLocator(t, s, newNetwork(map[string]way{amySidecar: answers}))
		reach(t, l, key("dc1", "amy"))
		for to, want := range map[catalog.Key]string{
			key("dc1", "amy"):  "1 direct " + amySidecar + ": healthy sidecar of dc1",
			key("dc1", ""):     "1 direct " + amySidecar + ": sidecar of dc1, not tried yet",
			key("dc2", "bob"):  "1 local gw.example:8443: local gateway, not tried yet",
			key("dc3", "carl"): "1 remote " + gw3 + ": gateway of dc3, not tried yet",
			key("dc4", "dan"):  "1 direct " + danSidecar + ": sidecar of dc4, not tried yet",
		} {
			if got := outline(t, l, to); !slices.Equal(got, []string{want}) {
				t.Errorf("%s: explained %v, want %s", to, got, want)
			}
		}
		if e, err := l.Explain(key("dc2", "")); err != nil || e.Mode != catalog.ModeLocal || e.Candidates[0].Resolved == nil {
			t.Errorf("Explain = %+v, %v", e, err)
		}
		if e, err := l.Explain(key("dc9", "bob")); !errors.Is(err, ErrUnknownPeer) || e.Candidates != nil {
			t.Errorf("Explain = %+v, %v", e, err)
		}
	})
}

// After a failure behind a replicated gateway the others of that state tell why
// they come after the configured ones.
func TestExplainDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := federated()
		s.Gateways, s.Datacenters[0].Replicated, s.Datacenters[0].Fallback = nil, []string{far2, gw3}, nil
		l, _ := newLocator(t, s, newNetwork(nil))
		bob := key("dc2", "bob")
		l.Report(bob, Path{KindRemote, far2, far2}, errors.New("no handshake"))
		got := outline(t, l, bob)
		want := "1 remote " + gw3 + ": gateway of dc2 that replicated state alone names, after the configured ones: another one of these led nowhere"
		if len(got) != 3 || got[1] != want {
			t.Errorf("explained %v", got)
		}
	})
}
