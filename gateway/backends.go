package gateway

import (
	"context"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"culvert/locator"
)

// A pool dials one of several addresses that serve the same;
// [locator.Pool] is one.
type pool interface {
	Set(endpoints []locator.Endpoint)
	Dial(ctx context.Context) (net.Conn, string, error)
	Report(endpoint string, err error)
	Status() []locator.EndpointStatus
	Run(ctx context.Context) error
}

// A backend is what one kind of name leads to.
type backend struct {
	pool pool
	flow *flow
	stop context.CancelFunc // nil until its pool runs

	mu   sync.Mutex
	open map[string]int // connections by address as configured
}

// opened counts a connection to an address, until closed.
func (b *backend) opened(endpoint string) {
	b.flow.open.Inc()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open[endpoint]++
}

func (b *backend) closed(endpoint string) {
	b.flow.open.Dec()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[endpoint]--; b.open[endpoint] == 0 {
		delete(b.open, endpoint)
	}
}

func (b *backend) openTo(endpoint string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[endpoint]
}

// backends follows the configuration: what is in the routes has a pool, and once
// run was called, each pool runs.
type backends struct {
	newPool func() pool
	current atomic.Pointer[snapshot] // what the data path reads; replaced whole

	mu  sync.Mutex
	ctx context.Context //nolint:containedctx // run's, for pools that set adds later
	wg  sync.WaitGroup
}

type snapshot struct {
	routes   *routes
	backends map[backendKey]*backend
}

func newBackends(newPool func() pool) *backends {
	b := &backends{newPool: newPool}
	b.current.Store(&snapshot{routes: &routes{}})
	return b
}

// set makes r the routes. Pools that stay keep what they know of their addresses;
// those that go end, and the connections that they dialled stay.
func (b *backends) set(r *routes, m *metrics) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.current.Load()
	m.to(r.datacenter) // at zero, whether it has sidecars or not
	next := &snapshot{routes: r, backends: make(map[backendKey]*backend, len(r.backends))}
	for key, endpoints := range r.backends {
		be := old.backends[key]
		switch {
		case be == nil:
			be = &backend{pool: b.newPool(), flow: m.to(key.datacenter), open: make(map[string]int)}
			be.pool.Set(endpoints)
			b.start(be)
		case !slices.Equal(endpoints, old.routes.backends[key]):
			be.pool.Set(endpoints)
		}
		next.backends[key] = be
	}
	b.current.Store(next)
	for key, be := range old.backends {
		if next.backends[key] == nil && be.stop != nil {
			be.stop()
		}
	}
}

// start runs a pool once run was called. Called with mu held.
func (b *backends) start(be *backend) {
	if b.ctx == nil {
		return
	}
	ctx, stop := context.WithCancel(b.ctx)
	be.stop = stop
	b.wg.Go(func() {
		defer stop()
		_ = be.pool.Run(ctx) // nil when ctx ends
	})
}

// run starts every pool, for as long as ctx lasts.
func (b *backends) run(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ctx = ctx
	for _, be := range b.current.Load().backends {
		b.start(be)
	}
}

// wait returns when every pool has ended, after the context of run has.
func (b *backends) wait() { b.wg.Wait() }

// find returns the backend of a server name.
func (b *backends) find(serverName string) (*backend, bool) {
	s := b.current.Load()
	key, ok := s.routes.find(serverName)
	return s.backends[key], ok
}
