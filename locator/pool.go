package locator

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/internal/resolve"
)

// A Resolver turns endpoints into addresses; [*resolve.Resolver] is one.
type Resolver interface {
	// Addresses returns the addresses of an endpoint, host:port or "srv:NAME",
	// for the caller to keep, when ctx ends at the latest. Those of a service are
	// in the order in which to try them.
	Addresses(ctx context.Context, endpoint string) ([]netip.AddrPort, error)
	// Known returns what Addresses returned last, and asks nobody.
	Known(endpoint string) []netip.AddrPort
	// Forget tells that none of the addresses could be connected to.
	Forget(endpoint string)
}

// PoolOptions configure a [Pool].
type PoolOptions struct {
	// Resolver looks names up. Nil means one of the pool's own, which Run
	// closes when it ends.
	Resolver Resolver
	// Control is set on each socket before it connects, as [net.Dialer]'s. Nil
	// sets nothing. Keepalive is its business too, or that of whoever dials.
	Control func(network, address string, c syscall.RawConn) error
	// Dial replaces the connecting itself, for tests. Nil means [net.Dialer].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Forbid tells why an address must not be connected to, and returns nil for
	// one that may. It is asked before each connection, probes included, to an
	// endpoint that only replicated state names: there, others say what this host
	// dials. Nil forbids nothing.
	Forbid func(netip.AddrPort) error
	// NoProbe leaves health to dials alone.
	NoProbe bool
	// OnDemand is for one of very many pools. From ten minutes after a dial on,
	// what is healthy is not probed, and what is down every 10 s alone. Endpoints
	// are shown in metrics once they have been tried.
	OnDemand bool
	// Log receives changes of health. Nil means no log.
	Log *zap.Logger
	// Metrics counts probes and shows health. Nil means none.
	Metrics *Metrics
}

// An Endpoint is one of a pool's.
type Endpoint struct {
	Address    string // host:port, or "srv:NAME" for all that the SRV records of a name lead to
	Replicated bool   // replicated state says so, not the configuration
}

// Configured returns endpoints that the configuration names.
func Configured(addresses ...string) []Endpoint {
	out := make([]Endpoint, len(addresses))
	for i, a := range addresses {
		out[i].Address = a
	}
	return out
}

// EndpointStatus is what a pool knows of one endpoint.
type EndpointStatus struct {
	Endpoint   string    // as it was given
	Configured bool      // by the configuration
	Replicated bool      // by replicated state, perhaps as well
	Healthy    bool      // new ones are taken for healthy
	Tried      bool      // a dial or probe has told
	LastError  string    // why a dial or probe last failed, kept after recovery; "" never
	Since      time.Time // when Healthy last changed
}

// A Pool dials one of several endpoints that serve the same. It prefers healthy
// ones, and of two at random the one with less to do and quicker answers. An
// endpoint is a host and a port, or a service; a name counts with all its addresses.
//
// Health comes from dials and, while Run runs, from a TCP probe every 10 s,
// every second while an endpoint is down. It decides the order alone: with no
// healthy endpoint the others are tried all the same.
type Pool struct {
	o    PoolOptions
	log  *zap.Logger
	own  *resolve.Resolver // nil if it was given one
	wake chan struct{}     // Run looks again at what is due

	mu        sync.Mutex
	endpoints []*endpoint // in the order given
	used      time.Time   // when one was last dialled
	ended     bool        // Run has: health is not shown any more
}

// An endpoint is guarded by its pool's mutex.
type endpoint struct {
	address string         // never changes, nor do the next two
	literal netip.AddrPort // the same; invalid where it is a name
	service bool

	configured, replicated bool

	healthy   bool
	tried     bool
	since     time.Time
	lastError string
	failed    map[netip.AddrPort]bool // those of its addresses that failed last time
	dialing   int
	latency   time.Duration // of connecting, moving average; 0 unknown
	nextProbe time.Time
	probing   bool
}

// NewPool returns a pool without endpoints.
func NewPool(o PoolOptions) *Pool {
	p := &Pool{wake: make(chan struct{}, 1)}
	if o.Resolver == nil {
		p.own = resolve.New(resolve.Options{})
		o.Resolver = p.own
	}
	if o.Dial == nil {
		d := &net.Dialer{Control: o.Control, KeepAlive: -1}
		o.Dial = d.DialContext
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	p.o, p.log = o, o.Log.Named("locator")
	return p
}

// Set makes endpoints the pool's. One that is given twice, configured and
// replicated, is both. Those that stay keep what is known of them; connections are
// not touched.
func (p *Pool) Set(endpoints []Endpoint) {
	defer p.rouse()
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.endpoints
	p.endpoints = nil
	for _, given := range endpoints {
		e := find(p.endpoints, given.Address)
		if e == nil {
			if e = find(old, given.Address); e == nil {
				e = newEndpoint(given.Address)
				p.show(e)
			}
			e.configured, e.replicated = false, false
			p.endpoints = append(p.endpoints, e)
		}
		e.configured = e.configured || !given.Replicated
		e.replicated = e.replicated || given.Replicated
	}
	for _, e := range old {
		if find(p.endpoints, e.address) == nil {
			p.hide(e)
		}
	}
}

func newEndpoint(address string) *endpoint {
	e := &endpoint{
		address: address, service: resolve.IsService(address),
		healthy: true, since: time.Now(), failed: make(map[netip.AddrPort]bool),
	}
	if a, err := netip.ParseAddrPort(address); err == nil {
		e.literal = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return e
}

func find(endpoints []*endpoint, address string) *endpoint {
	i := slices.IndexFunc(endpoints, func(e *endpoint) bool { return e.address == address })
	if i < 0 {
		return nil
	}
	return endpoints[i]
}

// show begins to publish an endpoint's health, and hide ends it. Called with mu
// held.
func (p *Pool) show(e *endpoint) {
	if !p.o.NoProbe && !p.ended && (!p.o.OnDemand || e.tried) {
		p.o.Metrics.show(e, e.address, e.healthy)
	}
}

func (p *Pool) hide(e *endpoint) {
	if !p.o.NoProbe && !p.ended {
		p.o.Metrics.hide(e, e.address)
	}
}

// end is the end of Run.
func (p *Pool) end() {
	p.mu.Lock()
	for _, e := range p.endpoints {
		p.hide(e)
	}
	p.ended = true
	p.mu.Unlock()
	if p.own != nil {
		p.own.Close()
	}
}

// note sets an endpoint's health: up if err is nil.
func (p *Pool) note(e *endpoint, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		e.lastError = err.Error()
	}
	current := find(p.endpoints, e.address) == e // or it was taken out meanwhile
	first, changed := !e.tried, e.healthy != (err == nil)
	e.tried = true
	if changed {
		e.healthy, e.since = err == nil, time.Now()
	}
	if first && current && p.o.OnDemand {
		p.show(e)
	}
	if !changed || !current {
		return
	}
	p.o.Metrics.healthy(e, e.address, e.healthy)
	if e.healthy {
		p.log.Info("endpoint up", zap.String("gateway", e.address))
		return
	}
	p.log.Warn("endpoint down", zap.String("gateway", e.address), zap.Error(err))
	e.nextProbe = e.since.Add(jitter(probeDownEvery))
	p.rouse()
}

// Report tells how a connection to an endpoint fared: err, or nil if it worked.
func (p *Pool) Report(endpoint string, err error) {
	p.mu.Lock()
	e := find(p.endpoints, endpoint)
	p.mu.Unlock()
	if e != nil {
		p.note(e, err)
	}
}

func (p *Pool) has(endpoint string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return find(p.endpoints, endpoint) != nil
}

// Status returns what is known of each endpoint, in the order they were given.
func (p *Pool) Status() []EndpointStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]EndpointStatus, 0, len(p.endpoints))
	for _, e := range p.endpoints {
		out = append(out, e.status())
	}
	return out
}

// status describes an endpoint. Called with the pool's mu held.
func (e *endpoint) status() EndpointStatus {
	return EndpointStatus{
		Endpoint: e.address, Configured: e.configured, Replicated: e.replicated,
		Healthy: e.healthy, Tried: e.tried, LastError: e.lastError, Since: e.since,
	}
}
