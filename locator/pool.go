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

// A Resolver turns host names into addresses; [*resolve.Resolver] is one.
type Resolver interface {
	// Lookup returns when ctx ends at the latest.
	Lookup(ctx context.Context, host string) (resolve.Answer, error)
	// Forget tells that none of the addresses of a host could be connected to.
	Forget(host string)
}

// PoolOptions configure a [Pool].
type PoolOptions struct {
	// Resolver looks host names up. Nil means one of the pool's own, which Run
	// closes when it ends.
	Resolver Resolver
	// Control is set on each socket before it connects, as [net.Dialer]'s. Nil
	// sets nothing.
	Control func(network, address string, c syscall.RawConn) error
	// Dial replaces the connecting itself, for tests. Nil means [net.Dialer].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// NoProbe leaves health to dials alone.
	NoProbe bool
	// Log receives changes of health. Nil means no log.
	Log *zap.Logger
	// Metrics counts probes and shows health. Nil means none.
	Metrics *Metrics
}

// EndpointStatus is what a pool knows of one endpoint.
type EndpointStatus struct {
	Endpoint  string    // as it was given
	Healthy   bool      // new ones are taken for healthy
	LastError string    // why a dial or probe last failed, kept after recovery; "" never
	Since     time.Time // when Healthy last changed
}

// A Pool dials one of several endpoints that serve the same. It prefers healthy
// ones, and of two at random the one with less to do and quicker answers. An
// endpoint is a host and a port; a name counts with all its addresses.
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
	ended     bool        // Run has: health is not shown any more
}

// An endpoint is guarded by its pool's mutex.
type endpoint struct {
	address    string
	host, port string

	healthy   bool
	since     time.Time
	lastError string
	failed    map[netip.Addr]bool // those of its addresses that failed last time
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
		d := &net.Dialer{Control: o.Control}
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

// Set makes endpoints, host:port each, the pool's. Those that stay keep what is
// known of them; connections are not touched.
func (p *Pool) Set(endpoints []string) {
	defer p.rouse()
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.endpoints
	p.endpoints = nil
	for _, address := range endpoints {
		if find(p.endpoints, address) != nil {
			continue
		}
		e := find(old, address)
		if e == nil {
			e = newEndpoint(address)
			p.show(e)
		}
		p.endpoints = append(p.endpoints, e)
	}
	for _, e := range old {
		if find(p.endpoints, e.address) == nil {
			p.hide(e)
		}
	}
}

func newEndpoint(address string) *endpoint {
	host, port, err := net.SplitHostPort(address)
	if err != nil { // the configuration has been checked: the dial will say it
		host = address
	}
	return &endpoint{
		address: address, host: host, port: port, healthy: true, since: time.Now(), failed: make(map[netip.Addr]bool),
	}
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
	if !p.o.NoProbe && !p.ended {
		p.o.Metrics.show(e, e.address)
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
	if e.healthy == (err == nil) {
		return
	}
	e.healthy, e.since = err == nil, time.Now()
	if find(p.endpoints, e.address) != e {
		return // it was taken out meanwhile
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
		out = append(out, EndpointStatus{Endpoint: e.address, Healthy: e.healthy, LastError: e.lastError, Since: e.since})
	}
	return out
}
