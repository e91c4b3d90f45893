package locator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"culvert/internal/pause"
)

const (
	// attemptTimeout bounds one attempt at one address. SYNs that were lost are
	// sent again by the kernel at longer and longer intervals; an attempt of
	// its own each second uses a path that comes back within that second.
	attemptTimeout = time.Second
	// leastRound is how long one round over all endpoints takes at least.
	leastRound = 250 * time.Millisecond
	// latencyWeight is the weight of the newest dial in the moving average.
	latencyWeight = 0.3
)

// ErrNoEndpoint is returned by a dial of a pool that has none.
var ErrNoEndpoint = errors.New("no endpoint is known")

// Dial connects to an endpoint and tells which. It tries all of them, and all
// their addresses, before it gives up. As long as some did merely not answer, or
// were out of reach, it goes on until ctx ends, so ctx should; when all have
// refused it fails at once.
func (p *Pool) Dial(ctx context.Context) (net.Conn, string, error) {
	c, won, err := dialAny(ctx, []tier{{pool: p}}, nil)
	if err != nil {
		return nil, "", err
	}
	return c, won.known.Endpoint, nil
}

// dialAny is Dial over several pools: the endpoints of all of them are in one race,
// so that a tier that does not answer holds up the next one no longer than one
// endpoint does another. What avoid has is tried later.
func dialAny(ctx context.Context, tiers []tier, avoid map[string]time.Time) (net.Conn, entrant, error) {
	var last error
	for {
		round := time.Now()
		order := order(tiers, avoid)
		if len(order) == 0 {
			return nil, entrant{}, ErrNoEndpoint
		}
		winner, outcomes := race(ctx, len(order), func(ctx context.Context, i int) (net.Conn, error) {
			return order[i].pool.attempt(ctx, order[i].endpoint)
		})
		for i, o := range outcomes {
			if known, err := o.verdict(ctx); known {
				order[i].pool.note(order[i].endpoint, err)
			}
		}
		if winner >= 0 {
			return outcomes[winner].conn, order[winner], nil
		}
		again, err := summary(order, outcomes)
		if ctx.Err() == nil || last == nil {
			last = err // what a cut-off round says is less than the one before
		}
		if !again || !pause.For(ctx, leastRound-time.Since(round)) {
			return nil, entrant{}, last
		}
	}
}

// A dialError is why none of several candidates was connected to.
type dialError []error

func (e dialError) Error() string {
	text := make([]string, len(e))
	for i, err := range e {
		text[i] = err.Error()
	}
	return strings.Join(text, "; ")
}

// Unwrap returns the errors of the candidates.
func (e dialError) Unwrap() []error { return e }

func joined(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return dialError(errs)
}

// summary joins what the endpoints' attempts ended with, and tells whether to
// try again.
func summary(order []entrant, outcomes []outcome) (again bool, err error) {
	errs := make([]error, len(outcomes))
	for i, o := range outcomes {
		errs[i] = fmt.Errorf("dial %s: %w", order[i].known.Endpoint, o.err)
		again = again || isAway(o.err)
	}
	return again, joined(errs)
}

// isAway tells an endpoint that may just be cut off from one that is there and
// refuses. An address of a kind that this host cannot reach says nothing while
// there is another.
func isAway(err error) bool {
	var many dialError
	if !errors.As(err, &many) {
		return isTimeout(err) || isUnreachable(err)
	}
	rest := slices.DeleteFunc(slices.Clone(many), isUnreachable)
	return len(rest) == 0 || slices.ContainsFunc(rest, isTimeout)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

func isUnreachable(err error) bool {
	for _, out := range []syscall.Errno{syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN} {
		if errors.Is(err, out) {
			return true
		}
	}
	return false
}

// attempt dials one endpoint, all its addresses if need be.
func (p *Pool) attempt(ctx context.Context, e *endpoint) (net.Conn, error) {
	dialing := func(n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		e.dialing += n
		if p.o.OnDemand {
			p.used = time.Now()
		}
	}
	dialing(1)
	defer dialing(-1)
	addrs, err := p.addresses(ctx, e, attemptTimeout)
	if err != nil {
		return nil, err
	}
	winner, outcomes := race(ctx, len(addrs), func(ctx context.Context, i int) (net.Conn, error) {
		return p.connect(ctx, e, addrs[i], attemptTimeout)
	})
	errs := make([]error, len(outcomes))
	for i, o := range outcomes {
		errs[i] = o.err
		if known, err := o.verdict(ctx); known {
			p.learn(e, addrs[i], o.took, err)
		}
	}
	if winner >= 0 {
		return outcomes[winner].conn, nil
	}
	p.forget(e)
	return nil, joined(errs)
}

// forget lets an endpoint be looked up again: its addresses may have changed.
func (p *Pool) forget(e *endpoint) {
	if !e.literal.IsValid() {
		p.o.Resolver.Forget(e.address)
	}
}

func (p *Pool) connect(ctx context.Context, e *endpoint, to netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	if err := p.forbidden(e, to); err != nil {
		return nil, err
	}
	ctx, cancel := pause.Within(ctx, timeout)
	defer cancel()
	return p.o.Dial(ctx, "tcp", to.String())
}

// forbidden tells why an address of an endpoint must not be connected to.
func (p *Pool) forbidden(e *endpoint, a netip.AddrPort) error {
	if p.o.Forbid == nil {
		return nil
	}
	p.mu.Lock()
	foreign := e.replicated && !e.configured
	p.mu.Unlock()
	if !foreign {
		return nil
	}
	if err := p.o.Forbid(netip.AddrPortFrom(a.Addr().Unmap(), a.Port())); err != nil {
		return fmt.Errorf("%s is forbidden to replicated state: %w", a, err)
	}
	return nil
}

// addresses returns an endpoint's addresses, at least one, in the order in which
// to try them: at random, or as a service has them; those that failed last. A
// look-up that takes longer than timeout goes on, for the next call.
func (p *Pool) addresses(ctx context.Context, e *endpoint, timeout time.Duration) ([]netip.AddrPort, error) {
	if e.literal.IsValid() {
		return []netip.AddrPort{e.literal}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addrs, err := p.o.Resolver.Addresses(ctx, e.address)
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("resolve %s: no address", e.address)
	}
	if !e.service {
		shuffle(addrs)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := range e.failed {
		if !slices.Contains(addrs, a) {
			delete(e.failed, a)
		}
	}
	slices.SortStableFunc(addrs, func(a, b netip.AddrPort) int { return less(e.failed[b], e.failed[a]) })
	return addrs, nil
}

// less orders what has a quality before what has not.
func less(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// learn keeps how connecting to one address of an endpoint went: well if err is
// nil, and then how quickly.
func (p *Pool) learn(e *endpoint, a netip.AddrPort, took time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		e.failed[a] = true
		return
	}
	delete(e.failed, a)
	if e.latency == 0 {
		e.latency = took
	}
	e.latency += time.Duration(latencyWeight * float64(took-e.latency))
}
