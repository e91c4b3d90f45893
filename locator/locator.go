// Package locator finds a way to a peer's sidecar: straight, through the own
// datacenter's gateways, through the other's, or whichever of these works.
//
//	l, err := locator.New(catalog, locator.Options{Metrics: m})
//	go l.Run(ctx)
//	conn, path, err := l.Dial(ctx, bob)
//	...
//	l.Report(bob, path, handshakeErr)
//
// A [Locator] follows the catalog. Gateways are kept in pools, one for each set
// that is dialled; see [Pool] for how one of them is chosen. With
// [catalog.ModeAuto] several pools are tiers of one dial: that is an order and no
// filter, so what is further down is tried when what is above fails. That a path
// failed behind a gateway that took the connection says little about the gateway:
// it is avoided for that peer for a while, and for no other.
//
// A peer without a node means any server of its datacenter. [Locator.Explain]
// tells how a peer would be dialled now, and why.
//
// Both types are for any number of goroutines. The connections they return are
// bare TCP: who is at the other end is not their business.
package locator

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/resolve"
)

// The kinds of [Path].
const (
	KindDirect  = "direct"  // straight to the peer's sidecar
	KindLocal   = "local"   // through a gateway of the own datacenter
	KindRemote  = "remote"  // through a gateway of the peer's datacenter
	KindPrimary = "primary" // through one of the Fallback gateways of the peer's datacenter
)

// ErrUnknownPeer is returned for a peer that the catalog does not have.
var ErrUnknownPeer = errors.New("the catalog has no such peer")

// Options configure a [Locator]. They are [PoolOptions] for all of its pools,
// which share one Resolver.
type Options struct {
	Resolver Resolver
	Control  func(network, address string, c syscall.RawConn) error
	Dial     func(ctx context.Context, network, address string) (net.Conn, error)
	Forbid   func(netip.AddrPort) error
	Log      *zap.Logger
	Metrics  *Metrics
}

// A Path is how a connection reaches a peer.
type Path struct {
	Kind string // direct, local, remote or primary
	// Gateway is the gateway as configured; "" for direct, or before the first
	// dial. Of a direct path to any server of a datacenter it is the sidecar.
	Gateway string
	Address string // what was dialled, ip:port; "" before the first dial
}

// GatewayStatus is what is known of one gateway.
type GatewayStatus struct {
	Address    string // as configured
	Datacenter string // whose gateway it is, or is a fallback for
	Healthy    bool
	LastError  string
	Replicated bool   // replicated state names it, perhaps besides the configuration
	Kind       string // local, remote or primary
}

// A Locator dials peers. Make one with [New].
type Locator struct {
	catalog *catalog.Catalog
	o       Options
	own     *resolve.Resolver // nil if it was given one

	mu      sync.Mutex
	seen    *catalog.Snapshot // what the pools were made from
	pools   map[poolKey]*pool
	last    map[catalog.Key]Path       // of the newest dial; of peers, and of any server
	avoid   map[catalog.Key]*avoidance // what led nowhere
	ctx     context.Context            // Run's, for pools made later
	running sync.WaitGroup
	ended   bool
}

// New returns a locator for a catalog.
func New(c *catalog.Catalog, o Options) (*Locator, error) {
	if c == nil {
		return nil, errors.New("locator: the catalog is required")
	}
	l := &Locator{
		catalog: c, pools: make(map[poolKey]*pool), last: make(map[catalog.Key]Path),
		avoid: make(map[catalog.Key]*avoidance),
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	if o.Resolver == nil {
		l.own = resolve.New(resolve.Options{})
		o.Resolver = l.own
	}
	l.o = o
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh()
	return l, nil
}

// Dial connects to a peer's sidecar, or to a gateway on the way to it, and goes
// on trying as [Pool.Dial] does. A peer without a node is any server of its
// datacenter. In another datacenter that the catalog knows, a node that it does not
// know is dialled like the others: whether there is one is decided there.
func (l *Locator) Dial(ctx context.Context, to catalog.Key) (net.Conn, Path, error) {
	l.mu.Lock()
	l.refresh()
	tiers, err := l.route(to)
	avoid := l.avoided(to)
	l.mu.Unlock()
	if err != nil {
		return nil, Path{}, err
	}
	c, won, err := dialAny(ctx, tiers, avoid)
	if err != nil {
		l.o.Metrics.dialled(tiers[0].kind, false)
		return nil, Path{}, err
	}
	path := Path{Kind: tiers[won.tier].kind, Address: c.RemoteAddr().String()}
	if path.Kind != KindDirect || to.Node == "" {
		path.Gateway = won.known.Endpoint
	}
	l.o.Metrics.dialled(path.Kind, true)
	l.mu.Lock()
	defer l.mu.Unlock()
	_, known := l.seen.Peer(to)
	if known || to.Node == "" && l.seen.Knows(to.Datacenter) { // or it left meanwhile
		l.last[to] = path
	}
	return c, path, nil
}

// refresh makes the pools those of the catalog's snapshot. Called with mu held.
func (l *Locator) refresh() {
	before, now := l.seen, l.catalog.Load()
	if now == before {
		return
	}
	l.seen = now
	wanted := wanted(now)
	for key, endpoints := range wanted {
		p := l.pools[key]
		if p == nil {
			p = l.newPool(key)
			l.pools[key] = p
			l.start(p)
		}
		if !slices.Equal(p.given, endpoints) {
			p.given = endpoints
			p.Set(endpoints)
		}
	}
	for key, p := range l.pools {
		if _, stays := wanted[key]; stays {
			continue
		}
		p.Set(nil)
		if p.stop != nil {
			p.stop()
		}
		delete(l.pools, key)
	}
	left := func(k catalog.Key) bool {
		if !now.Knows(k.Datacenter) {
			return true
		}
		_, stays := now.Peer(k)
		return !stays && before != nil && has(before, k)
	}
	maps.DeleteFunc(l.last, func(k catalog.Key, _ Path) bool { return left(k) })
	maps.DeleteFunc(l.avoid, func(k catalog.Key, _ *avoidance) bool { return left(k) })
}

func has(s *catalog.Snapshot, k catalog.Key) bool {
	_, ok := s.Peer(k)
	return ok
}

// start probes a pool of gateways, once Run has been called. The health of the
// only way to a peer decides nothing: it is not probed. Called with mu held.
func (l *Locator) start(p *pool) {
	if l.ctx == nil || l.ended || p.o.NoProbe {
		return
	}
	ctx, stop := context.WithCancel(l.ctx)
	p.stop = stop
	l.running.Go(func() {
		defer stop()
		_ = p.Run(ctx) // nil when ctx ends
	})
}

// Path tells how a peer is reached, with the gateway of the newest dial, or the
// kind that a dial would try first. It is zero for a peer without a path.
func (l *Locator) Path(to catalog.Key) Path {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh()
	tiers, err := l.route(to)
	if err != nil {
		return Path{}
	}
	last := l.last[to]
	for _, t := range tiers {
		if last.Kind == t.kind && (last.Gateway == "" || t.pool.has(last.Gateway)) {
			return last
		}
	}
	if len(tiers) == 1 {
		return Path{Kind: tiers[0].kind}
	}
	for _, first := range order(tiers, l.avoided(to)) {
		return Path{Kind: tiers[first.tier].kind}
	}
	return Path{}
}

// Gateways returns the gateways that may be dialled, the own datacenter's first.
// One that is known as a datacenter's own is not listed as its fallback as well.
func (l *Locator) Gateways() []GatewayStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh()
	out := l.gateways(nil, localKey(l.seen))
	for i := range l.seen.Datacenters {
		d := &l.seen.Datacenters[i]
		if d.Name == l.seen.Self.Datacenter {
			continue
		}
		own := len(out)
		for _, key := range throughGateways(l.seen, d.Name, d.Mode) {
			if key.kind != KindLocal {
				out = append(out[:own], l.gateways(out[own:], key)...)
			}
		}
	}
	return out
}

// gateways adds those of a pool that are not there yet. Called with mu held.
func (l *Locator) gateways(to []GatewayStatus, key poolKey) []GatewayStatus {
	p := l.pools[key]
	if p == nil {
		return to
	}
	for _, e := range p.Status() {
		if slices.ContainsFunc(to, func(g GatewayStatus) bool { return g.Address == e.Endpoint }) {
			continue
		}
		to = append(to, GatewayStatus{
			Address: e.Endpoint, Datacenter: key.datacenter, Healthy: e.Healthy, LastError: e.LastError,
			Replicated: e.Replicated, Kind: key.kind,
		})
	}
	return to
}

// Run probes gateways and follows the catalog until ctx ends. It returns nil.
func (l *Locator) Run(ctx context.Context) error {
	l.mu.Lock()
	l.ctx = ctx
	for _, p := range l.pools {
		l.start(p)
	}
	l.mu.Unlock()
	for ctx.Err() == nil {
		changed := l.catalog.Changed()
		l.mu.Lock()
		l.refresh()
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.running.Wait()
	if l.own != nil {
		l.own.Close()
	}
	return nil
}
