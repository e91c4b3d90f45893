package locator

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"
)

// A tier is one way to a peer: a pool of those that may be dialled for it.
type tier struct {
	kind       string
	datacenter string // whose the endpoints are
	pool       *Pool
}

// An entrant is an endpoint as it enters the race, with what decided its place.
type entrant struct {
	pool     *Pool
	endpoint *endpoint
	known    EndpointStatus
	dialing  int
	latency  time.Duration

	tier    int
	until   time.Time // avoided for the peer until then; zero: not
	doubted bool      // as another from replicated state led nowhere
	rank    int       // the lowest first; among equals it is the balancing that decides
}

// order is how the endpoints of tiers are to be tried, each address once: by
// health, then those that are not to be avoided, then by tier, so that a healthy
// endpoint of the last tier comes before an unhealthy one of the first. Local
// gateways that are unhealthy come at the very end: they are near and probed all
// the time, so that nothing is known as surely. Of those that are alike, the better one of two at
// random is the first, and chance orders the rest.
func order(tiers []tier, avoid map[string]time.Time) []entrant {
	var order []entrant
	now := time.Now()
	for i, t := range tiers {
		order = t.pool.enter(order, i)
	}
	for i := range order {
		if until := avoid[order[i].known.Endpoint]; now.Before(until) {
			order[i].until = until
		}
	}
	doubtful := order
	if len(avoid) == 0 {
		doubtful = nil
	}
	for i := range order {
		order[i].place(tiers, doubtful)
	}
	shuffle(order)
	slices.SortStableFunc(order, func(a, b entrant) int { return cmp.Compare(a.rank, b.rank) })
	for i := 0; i+1 < len(order); i++ {
		if i > 0 && order[i].rank == order[i-1].rank {
			continue
		}
		if order[i].rank == order[i+1].rank && order[i+1].better(&order[i]) {
			order[i], order[i+1] = order[i+1], order[i]
		}
	}
	return order
}

// enter adds a pool's endpoints, but for those that an upper tier has.
func (p *Pool) enter(to []entrant, tier int) []entrant {
	p.mu.Lock()
	defer p.mu.Unlock()
	to = slices.Grow(to, len(p.endpoints))
	for _, e := range p.endpoints {
		if tier > 0 && slices.ContainsFunc(to, func(other entrant) bool { return other.known.Endpoint == e.address }) {
			continue
		}
		to = append(to, entrant{
			pool: p, endpoint: e, known: e.status(), dialing: e.dialing, latency: e.latency, tier: tier,
		})
	}
	return to
}

// place gives an entrant its rank. Where an address from replicated state led
// nowhere, the configured ones of its tier come before the rest of that state:
// it may be stale as a whole, and each of its addresses may cost a handshake.
func (e *entrant) place(tiers []tier, others []entrant) {
	class := 0
	switch {
	case !e.known.Healthy && len(tiers) > 1 && tiers[e.tier].kind == KindLocal:
		class = 2
	case !e.known.Healthy:
		class = 1
	}
	e.doubted = e.foreign() && slices.ContainsFunc(others, func(o entrant) bool { return o.tier == e.tier && o.avoided() && o.foreign() })
	e.rank = class
	for _, worse := range []int{one(e.avoided()), e.tier, one(e.doubted)} {
		e.rank = e.rank<<4 | worse
	}
}

// foreign tells what replicated state alone names.
func (e *entrant) foreign() bool { return e.known.Replicated && !e.known.Configured }

func (e *entrant) avoided() bool { return !e.until.IsZero() }

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

func shuffle[T any](s []T) {
	rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) //nolint:gosec // spreads load: nothing depends on it being secret
}

// better compares two endpoints by what they have to do now, and by how quick
// they were where one was at least a third quicker.
func (e *entrant) better(than *entrant) bool {
	if e.dialing != than.dialing {
		return e.dialing < than.dialing
	}
	return e.latency > 0 && e.latency*3/2 < than.latency
}
