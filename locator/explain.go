package locator

import (
	"fmt"
	"net/netip"
	"time"

	"culvert/catalog"
)

// An Explanation is how a peer would be dialled at this moment.
type Explanation struct {
	Datacenter string       `json:"datacenter"`
	Node       string       `json:"node"` // "" for any server
	Mode       catalog.Mode `json:"mode"`
	Candidates []Candidate  `json:"candidates"` // in the order in which they would be tried
}

// A Candidate is one that would be dialled, if none before it answered.
type Candidate struct {
	Tier         int              `json:"tier"` // 1 is the way that is preferred
	Kind         string           `json:"kind"` // as of a [Path]
	Address      string           `json:"address"`
	Datacenter   string           `json:"datacenter"` // whose it is, or is a fallback for
	Configured   bool             `json:"configured"`
	Replicated   bool             `json:"replicated"`
	Resolved     []netip.AddrPort `json:"resolved"` // as far as is known without asking
	Healthy      bool             `json:"healthy"`
	Since        time.Time        `json:"since"` // when Healthy last changed
	AvoidedUntil time.Time        `json:"avoided_until,omitzero"`
	LastError    string           `json:"last_error"`
	Forbidden    string           `json:"forbidden,omitempty"` // why none of Resolved may be connected to
	Reason       string           `json:"reason"`              // why it stands where it stands
}

// Explain tells how a peer would be dialled now, and dials nobody. Two calls may
// differ in the order of those that are alike, as two dials do. Its errors are
// those of a Dial that has no path.
func (l *Locator) Explain(to catalog.Key) (Explanation, error) {
	l.mu.Lock()
	l.refresh()
	tiers, err := l.route(to)
	avoid, mode := l.avoided(to), modeOf(l.seen, to.Datacenter)
	l.mu.Unlock()
	if err != nil {
		return Explanation{}, err
	}
	out := Explanation{Datacenter: to.Datacenter, Node: to.Node, Mode: mode, Candidates: []Candidate{}}
	for _, e := range order(tiers, avoid) {
		t, known := tiers[e.tier], e.known
		c := Candidate{
			Tier: e.tier + 1, Kind: t.kind, Address: known.Endpoint, Datacenter: t.datacenter,
			Configured: known.Configured, Replicated: known.Replicated, Resolved: t.pool.resolved(e.endpoint),
			Healthy: known.Healthy, Since: known.Since, AvoidedUntil: e.until, LastError: known.LastError,
		}
		c.Forbidden = t.pool.allForbidden(e.endpoint, c.Resolved)
		c.Reason = e.reason(&c, to)
		out.Candidates = append(out.Candidates, c)
	}
	return out, nil
}

// resolved returns what is known of an endpoint's addresses without asking.
func (p *Pool) resolved(e *endpoint) []netip.AddrPort {
	if e.literal.IsValid() {
		return []netip.AddrPort{e.literal}
	}
	if known := p.o.Resolver.Known(e.address); known != nil {
		return known
	}
	return []netip.AddrPort{}
}

// allForbidden tells why no address may be connected to; "" if one may, or none
// is known.
func (p *Pool) allForbidden(e *endpoint, addrs []netip.AddrPort) string {
	why := ""
	for _, a := range addrs {
		err := p.forbidden(e, a)
		if err == nil {
			return ""
		}
		why = err.Error()
	}
	return why
}

// reason tells in words why an entrant stands where it stands.
func (e *entrant) reason(c *Candidate, to catalog.Key) string {
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	name := map[string]string{
		KindLocal: "local gateway", KindRemote: "gateway of " + c.Datacenter, KindPrimary: "fallback gateway",
		KindDirect: "sidecar of " + c.Datacenter,
	}[c.Kind]
	switch {
	case c.Forbidden != "":
		return name + " that is never connected to: " + c.Forbidden
	case !c.Healthy && c.Kind == KindLocal:
		return fmt.Sprintf("%s, down since %s, tried last", name, at(c.Since))
	case !c.Healthy:
		return fmt.Sprintf("%s, down since %s, tried after all that are healthy", name, at(c.Since))
	case e.avoided():
		return fmt.Sprintf("healthy %s, but %s was not reached through it: avoided until %s", name, to, at(e.until))
	case e.doubted:
		return fmt.Sprintf("%s that replicated state alone names, after the configured ones: another one of these led nowhere", name)
	case !e.known.Tried:
		return name + ", not tried yet"
	}
	return "healthy " + name
}
