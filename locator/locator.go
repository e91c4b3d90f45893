// Package locator finds a way to a peer's sidecar: straight, through the own
// datacenter's gateways or through the other's.
//
//	l, err := locator.New(catalog, locator.Options{Metrics: m})
//	go l.Run(ctx)
//	conn, path, err := l.Dial(ctx, bob)
//	...
//	l.Report(bob, path, handshakeErr)
//
// A [Locator] follows the catalog. Gateways are kept in pools, one for each set
// that is dialled; see [Pool] for how one of them is chosen. That a path failed
// behind a gateway that took the connection says little about the gateway: it
// is avoided for that peer for a while, and for no other.
//
// Both types are for any number of goroutines. The connections they return are
// bare TCP: who is at the other end is not their business.
package locator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/resolve"
)

// The kinds of [Path].
const (
	KindDirect = "direct" // straight to the peer's sidecar
	KindLocal  = "local"  // through a gateway of the own datacenter
	KindRemote = "remote" // through a gateway of the peer's datacenter
)

// avoidFor is how long a gateway is avoided for a peer that was not reached
// through it.
const avoidFor = 10 * time.Second

// ErrUnknownPeer is returned for a peer that the catalog does not have.
var ErrUnknownPeer = errors.New("the catalog has no such peer")

// Options configure a [Locator]. They are [PoolOptions] for all of its pools,
// which share one Resolver.
type Options struct {
	Resolver Resolver
	Control  func(network, address string, c syscall.RawConn) error
	Dial     func(ctx context.Context, network, address string) (net.Conn, error)
	Log      *zap.Logger
	Metrics  *Metrics
}

// A Path is how a connection reaches a peer.
type Path struct {
	Kind    string // direct, local or remote
	Gateway string // as configured; "" for direct, or before the first dial
	Address string // what was dialled, ip:port; "" before the first dial
}

// GatewayStatus is what is known of one gateway.
type GatewayStatus struct {
	Address    string // as configured
	Datacenter string // whose gateway it is
	Healthy    bool
	LastError  string
}

// A Locator dials peers. Make one with [New].
type Locator struct {
	catalog *catalog.Catalog
	o       Options
	own     *resolve.Resolver // nil if it was given one

	mu      sync.Mutex
	seen    *catalog.Snapshot // what the pools were made from
	pools   map[poolKey]*pool
	last    map[catalog.Key]Path                 // of the newest dial
	avoid   map[catalog.Key]map[string]time.Time // gateways, and until when
	ctx     context.Context                      // Run's, for pools made later
	running sync.WaitGroup
	ended   bool
}

// A poolKey is a datacenter's gateways, or one peer's sidecar.
type poolKey struct {
	kind       string
	datacenter string // of the gateways
	peer       catalog.Key
}

type pool struct {
	*Pool
	stop context.CancelFunc // nil until it runs
}

// New returns a locator for a catalog.
func New(c *catalog.Catalog, o Options) (*Locator, error) {
	if c == nil {
		return nil, errors.New("locator: the catalog is required")
	}
	l := &Locator{
		catalog: c, pools: make(map[poolKey]*pool), last: make(map[catalog.Key]Path),
		avoid: make(map[catalog.Key]map[string]time.Time),
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
// on trying as [Pool.Dial] does.
func (l *Locator) Dial(ctx context.Context, to catalog.Key) (net.Conn, Path, error) {
	l.mu.Lock()
	l.refresh()
	key, err := l.route(to)
	p := l.pools[key]
	l.mu.Unlock()
	if err != nil {
		return nil, Path{}, err
	}
	c, endpoint, err := p.DialAvoiding(ctx, l.avoided(to))
	l.o.Metrics.dialled(key.kind, err == nil)
	if err != nil {
		return nil, Path{}, err
	}
	path := Path{Kind: key.kind, Address: c.RemoteAddr().String()}
	if key.kind != KindDirect {
		path.Gateway = endpoint
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, known := l.seen.Peer(to); known { // or it left meanwhile
		l.last[to] = path
	}
	return c, path, nil
}

// route tells which pool leads to a peer. Called with mu held.
func (l *Locator) route(to catalog.Key) (poolKey, error) {
	if _, ok := l.seen.Peer(to); !ok {
		return poolKey{}, fmt.Errorf("find %s: %w (a peer block names it)", to, ErrUnknownPeer)
	}
	mode := catalog.ModeDirect
	if to.Datacenter != l.seen.Self.Datacenter {
		d, ok := l.seen.Datacenter(to.Datacenter)
		if mode = d.Mode; !ok {
			mode = catalog.ModeLocal
		}
	}
	key, lacking := poolKey{kind: KindDirect, peer: to}, "address of its peer block"
	switch mode {
	case catalog.ModeLocal:
		key, lacking = poolKey{kind: KindLocal, datacenter: l.seen.Self.Datacenter}, "gateways"
	case catalog.ModeRemote:
		key, lacking = poolKey{kind: KindRemote, datacenter: to.Datacenter}, fmt.Sprintf("gateways of datacenter %q", to.Datacenter)
	default:
	}
	if l.pools[key] == nil {
		return poolKey{}, fmt.Errorf("find a path to %s: %s: not configured", to, lacking)
	}
	return key, nil
}

// wanted returns the endpoints of each pool that a snapshot asks for.
func wanted(s *catalog.Snapshot) map[poolKey][]string {
	out := make(map[poolKey][]string)
	if len(s.Gateways) > 0 {
		out[poolKey{kind: KindLocal, datacenter: s.Self.Datacenter}] = s.Gateways
	}
	for _, d := range s.Datacenters {
		if d.Mode == catalog.ModeRemote && len(d.Gateways) > 0 {
			out[poolKey{kind: KindRemote, datacenter: d.Name}] = d.Gateways
		}
	}
	for _, p := range s.Peers {
		if p.Address != "" {
			out[poolKey{kind: KindDirect, peer: p.Key}] = []string{p.Address}
		}
	}
	return out
}

// refresh makes the pools those of the catalog's snapshot. Called with mu held.
func (l *Locator) refresh() {
	now := l.catalog.Load()
	if now == l.seen {
		return
	}
	l.seen = now
	wanted := wanted(now)
	for key, endpoints := range wanted {
		p := l.pools[key]
		if p == nil {
			p = &pool{Pool: NewPool(PoolOptions{
				Resolver: l.o.Resolver, Control: l.o.Control, Dial: l.o.Dial, Log: l.o.Log, Metrics: l.o.Metrics,
				NoProbe: key.kind == KindDirect,
			})}
			l.pools[key] = p
			l.start(p)
		}
		p.Set(endpoints)
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
	gone := func(k catalog.Key) bool { _, stays := now.Peer(k); return !stays }
	maps.DeleteFunc(l.last, func(k catalog.Key, _ Path) bool { return gone(k) })
	maps.DeleteFunc(l.avoid, func(k catalog.Key, _ map[string]time.Time) bool { return gone(k) })
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

// avoided tells which gateways to try last for a peer.
func (l *Locator) avoided(to catalog.Key) func(string) bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	bad := make(map[string]bool)
	for gateway, until := range l.avoid[to] {
		if now.Before(until) {
			bad[gateway] = true
		} else {
			delete(l.avoid[to], gateway)
		}
	}
	return func(gateway string) bool { return bad[gateway] }
}

// Report tells how a connection fared after it had been dialled: err, or nil if
// the peer itself answered. A gateway behind which a peer was not reached is
// tried last for that peer for ten seconds.
func (l *Locator) Report(to catalog.Key, path Path, err error) {
	if path.Gateway == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		delete(l.avoid[to], path.Gateway)
		return
	}
	if _, known := l.seen.Peer(to); !known {
		return // it left meanwhile
	}
	if l.avoid[to] == nil {
		l.avoid[to] = make(map[string]time.Time)
	}
	l.avoid[to][path.Gateway] = time.Now().Add(avoidFor)
}

// Path tells how a peer is reached, with the gateway of the newest dial. It is
// zero for a peer without a path.
func (l *Locator) Path(to catalog.Key) Path {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh()
	key, err := l.route(to)
	if err != nil {
		return Path{}
	}
	last := l.last[to]
	if last.Kind == key.kind && (last.Gateway == "" || l.pools[key].has(last.Gateway)) {
		return last
	}
	return Path{Kind: key.kind}
}

// Gateways returns the gateways that may be dialled, the own datacenter's first.
func (l *Locator) Gateways() []GatewayStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh()
	var out []GatewayStatus
	add := func(key poolKey) {
		p := l.pools[key]
		if p == nil {
			return
		}
		for _, e := range p.Status() {
			out = append(out, GatewayStatus{Address: e.Endpoint, Datacenter: key.datacenter, Healthy: e.Healthy, LastError: e.LastError})
		}
	}
	add(poolKey{kind: KindLocal, datacenter: l.seen.Self.Datacenter})
	for _, d := range l.seen.Datacenters {
		add(poolKey{kind: KindRemote, datacenter: d.Name})
	}
	return out
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
