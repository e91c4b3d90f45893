package locator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/internal/resolve"
)

const (
	// attemptTimeout bounds one attempt at one address. SYNs that were lost are
	// sent again by the kernel at longer and longer intervals; an attempt of
	// its own each second uses a path that comes back within that second.
	attemptTimeout = time.Second
	// shortestRound is how long one round over all endpoints takes at least.
	shortestRound = 250 * time.Millisecond

	probeEvery          = 10 * time.Second
	probeUnhealthyEvery = time.Second
	probeTick           = 250 * time.Millisecond
	maxProbes           = 16 // at a time

	// latencyWeight is the weight of the newest dial in the moving average.
	latencyWeight = 0.3
)

// A Resolver turns host names into addresses; [*resolve.Resolver] is one.
type Resolver interface {
	Lookup(ctx context.Context, host string) (resolve.Answer, error)
	Forget(host string)
}

// PoolOptions configure a [Pool].
type PoolOptions struct {
	// Resolver looks host names up. Nil means one of its own.
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
	o   PoolOptions
	log *zap.Logger

	mu        sync.Mutex
	endpoints []*endpoint // in the order given
}

// An endpoint is guarded by its pool's mutex.
type endpoint struct {
	address    string
	host, port string

	healthy   bool
	since     time.Time
	lastError string
	dialing   int
	latency   float64 // seconds, moving average; 0 unknown
	nextProbe time.Time
	probing   bool
}

// NewPool returns a pool without endpoints.
func NewPool(o PoolOptions) *Pool {
	if o.Resolver == nil {
		o.Resolver = resolve.New(resolve.Options{})
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
	return &Pool{o: o, log: o.Log.Named("locator")}
}

// Set makes endpoints, host:port each, the pool's. Those that stay keep what is
// known of them; connections are not touched.
func (p *Pool) Set(endpoints []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.endpoints
	p.endpoints = nil
	for _, address := range endpoints {
		if e := find(p.endpoints, address); e != nil {
			continue
		}
		e := find(old, address)
		if e == nil {
			e = &endpoint{address: address, healthy: true, since: time.Now()}
			host, port, err := net.SplitHostPort(address)
			if err != nil { // the configuration has been checked: the dial will say it
				host, port = address, ""
			}
			e.host, e.port = host, port
			p.show(e)
		}
		p.endpoints = append(p.endpoints, e)
	}
	for _, e := range old {
		if find(p.endpoints, e.address) == nil && !p.o.NoProbe {
			p.o.Metrics.forget(e.address)
		}
	}
}

func find(endpoints []*endpoint, address string) *endpoint {
	i := slices.IndexFunc(endpoints, func(e *endpoint) bool { return e.address == address })
	if i < 0 {
		return nil
	}
	return endpoints[i]
}

// show publishes an endpoint's health. Called with mu held.
func (p *Pool) show(e *endpoint) {
	if !p.o.NoProbe {
		p.o.Metrics.healthy(e.address, e.healthy)
	}
}

// ErrNoEndpoint is returned by a dial of a pool that has none.
var ErrNoEndpoint = errors.New("no endpoint is configured")

// Dial connects to an endpoint and tells which. It tries all of them, and all
// their addresses, before it gives up. As long as some did merely not answer it
// goes on until ctx ends, so ctx should; when all have refused it fails at once.
func (p *Pool) Dial(ctx context.Context) (net.Conn, string, error) {
	return p.DialAvoiding(ctx, nil)
}

// DialAvoiding is Dial, with the endpoints that avoid reports tried last.
func (p *Pool) DialAvoiding(ctx context.Context, avoid func(endpoint string) bool) (net.Conn, string, error) {
	var last error
	for {
		round := time.Now()
		order := p.order(avoid)
		if len(order) == 0 {
			return nil, "", ErrNoEndpoint
		}
		winner, outcomes := race(ctx, len(order), func(ctx context.Context, i int) (net.Conn, error) {
			return p.attempt(ctx, order[i])
		})
		for i, o := range outcomes {
			p.judge(ctx, order[i], o)
		}
		if winner >= 0 {
			return outcomes[winner].conn, order[winner].address, nil
		}
		silent, err := summary(order, outcomes)
		if ctx.Err() == nil || last == nil {
			last = err // what a cut-off round says is less than the one before
		}
		// A name that cannot be asked for may fail without any delay.
		if !silent || !sleep(ctx, shortestRound-time.Since(round)) {
			return nil, "", last
		}
	}
}

// sleep waits for d; false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// summary joins what the endpoints' attempts ended with, and tells whether some
// did merely not answer.
func summary(order []*endpoint, outcomes []outcome) (silent bool, err error) {
	var errs []error
	for i, o := range outcomes {
		errs = append(errs, fmt.Errorf("dial %s: %w", order[i].address, o.err))
		silent = silent || isTimeout(o.err)
	}
	if len(errs) == 1 {
		return silent, errs[0]
	}
	return silent, errors.Join(errs...)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

// order is how the endpoints are to be tried: healthy ones first, of two at
// random the better one first of all, then those to avoid or unhealthy.
func (p *Pool) order(avoid func(string) bool) []*endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	order := slices.Clone(p.endpoints)
	shuffle(order)
	class := func(e *endpoint) int {
		n := 0
		if !e.healthy {
			n += 2
		}
		if avoid != nil && avoid(e.address) {
			n++
		}
		return n
	}
	slices.SortStableFunc(order, func(a, b *endpoint) int { return cmp.Compare(class(a), class(b)) })
	if len(order) > 1 && class(order[0]) == class(order[1]) && order[1].better(order[0]) {
		order[0], order[1] = order[1], order[0]
	}
	return order
}

// better compares two endpoints by what they have to do now, and by how quick
// they were where one was at least a third quicker.
func (e *endpoint) better(than *endpoint) bool {
	if e.dialing != than.dialing {
		return e.dialing < than.dialing
	}
	return e.latency > 0 && e.latency*1.5 < than.latency
}

// attempt dials one endpoint, all its addresses if need be.
func (p *Pool) attempt(ctx context.Context, e *endpoint) (net.Conn, error) {
	p.mu.Lock()
	e.dialing++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		e.dialing--
		p.mu.Unlock()
	}()
	began := time.Now()
	c, err := p.connect(ctx, e)
	if err == nil {
		p.mu.Lock()
		took := time.Since(began).Seconds()
		if e.latency == 0 {
			e.latency = took
		}
		e.latency += latencyWeight * (took - e.latency)
		p.mu.Unlock()
	}
	return c, err
}

func (p *Pool) connect(ctx context.Context, e *endpoint) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	answer, err := p.o.Resolver.Lookup(ctx, e.host)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(e.port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port %q: %w", e.port, err)
	}
	addrs := slices.Clone(answer.Addrs)
	shuffle(addrs)
	winner, outcomes := race(ctx, len(addrs), func(ctx context.Context, i int) (net.Conn, error) {
		to := netip.AddrPortFrom(addrs[i], uint16(port)) //nolint:gosec // parsed as 16 bits
		return p.o.Dial(ctx, "tcp", to.String())
	})
	if winner >= 0 {
		return outcomes[winner].conn, nil
	}
	p.o.Resolver.Forget(e.host) // its addresses may have changed
	var errs []error
	for _, o := range outcomes {
		errs = append(errs, o.err)
	}
	if len(errs) == 1 {
		return nil, errs[0]
	}
	return nil, errors.Join(errs...)
}

// errSlow is why an endpoint is taken for down that another one overtook.
var errSlow = fmt.Errorf("no answer in %v while another answered", hedgeAfter)

// judge keeps what an attempt says about its endpoint's health. One that was
// called off says something only if it had its time.
func (p *Pool) judge(ctx context.Context, e *endpoint, o outcome) {
	switch {
	case o.err == nil:
		p.note(e, nil)
	case o.lost && o.slow:
		p.note(e, errSlow)
	case !o.lost && (ctx.Err() == nil || isTimeout(ctx.Err())):
		p.note(e, o.err)
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
	e.nextProbe = e.since.Add(probeUnhealthyEvery)
	if find(p.endpoints, e.address) == e {
		p.show(e)
	}
	if err != nil {
		p.log.Warn("endpoint down", zap.String("gateway", e.address), zap.Error(err))
	} else {
		p.log.Info("endpoint up", zap.String("gateway", e.address))
	}
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

// Run probes the endpoints until ctx ends, and returns nil.
func (p *Pool) Run(ctx context.Context) error {
	if p.o.NoProbe {
		<-ctx.Done()
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(probeTick)
	defer tick.Stop()
	slots := make(chan struct{}, maxProbes)
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		for _, e := range p.due() {
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				p.probe(ctx, e)
			})
		}
	}
}

// due claims the endpoints whose probe's time has come.
func (p *Pool) due() []*endpoint {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*endpoint
	for _, e := range p.endpoints {
		if e.nextProbe.IsZero() { // spread the first ones
			e.nextProbe = now.Add(within(probeEvery))
		}
		if e.probing || now.Before(e.nextProbe) {
			continue
		}
		e.probing = true
		out = append(out, e)
	}
	return out
}

func (p *Pool) probe(ctx context.Context, e *endpoint) {
	c, err := p.connect(ctx, e)
	if err == nil {
		_ = c.Close()
	}
	if ctx.Err() == nil {
		p.o.Metrics.probed(err == nil)
		p.note(e, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	e.probing = false
	every := probeEvery
	if !e.healthy {
		every = probeUnhealthyEvery
	}
	e.nextProbe = time.Now().Add(every*9/10 + within(every/5))
}

// shuffle and within spread load; they guard nothing.
func shuffle[T any](s []T) {
	rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) //nolint:gosec // see above
}

func within(d time.Duration) time.Duration { return rand.N(d) } //nolint:gosec // see above
