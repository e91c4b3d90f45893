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
var ErrNoEndpoint = errors.New("no endpoint is configured")

// Dial connects to an endpoint and tells which. It tries all of them, and all
// their addresses, before it gives up. As long as some did merely not answer, or
// were out of reach, it goes on until ctx ends, so ctx should; when all have
// refused it fails at once.
func (p *Pool) Dial(ctx context.Context) (net.Conn, string, error) {
	return p.DialAvoiding(ctx, nil)
}

// DialAvoiding is Dial, with the endpoints that avoid reports tried last among
// those of the same health.
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
			if known, err := o.verdict(ctx); known {
				p.note(order[i], err)
			}
		}
		if winner >= 0 {
			return outcomes[winner].conn, order[winner].address, nil
		}
		again, err := summary(order, outcomes)
		if ctx.Err() == nil || last == nil {
			last = err // what a cut-off round says is less than the one before
		}
		if !again || !pause.For(ctx, leastRound-time.Since(round)) {
			return nil, "", last
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
func summary(order []*endpoint, outcomes []outcome) (again bool, err error) {
	errs := make([]error, len(outcomes))
	for i, o := range outcomes {
		errs[i] = fmt.Errorf("dial %s: %w", order[i].address, o.err)
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

func shuffle[T any](s []T) {
	rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) //nolint:gosec // spreads load: nothing depends on it being secret
}

// better compares two endpoints by what they have to do now, and by how quick
// they were where one was at least a third quicker.
func (e *endpoint) better(than *endpoint) bool {
	if e.dialing != than.dialing {
		return e.dialing < than.dialing
	}
	return e.latency > 0 && e.latency*3/2 < than.latency
}

// attempt dials one endpoint, all its addresses if need be.
func (p *Pool) attempt(ctx context.Context, e *endpoint) (net.Conn, error) {
	dialing := func(n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		e.dialing += n
	}
	dialing(1)
	defer dialing(-1)
	addrs, err := p.addresses(ctx, e)
	if err != nil {
		return nil, err
	}
	winner, outcomes := race(ctx, len(addrs), func(ctx context.Context, i int) (net.Conn, error) {
		return p.connect(ctx, addrs[i], attemptTimeout)
	})
	errs := make([]error, len(outcomes))
	for i, o := range outcomes {
		errs[i] = o.err
		if known, err := o.verdict(ctx); known {
			p.learn(e, addrs[i].Addr(), o.took, err)
		}
	}
	if winner >= 0 {
		return outcomes[winner].conn, nil
	}
	p.o.Resolver.Forget(e.host) // its addresses may have changed
	return nil, joined(errs)
}

func (p *Pool) connect(ctx context.Context, to netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return p.o.Dial(ctx, "tcp", to.String())
}

// addresses returns an endpoint's addresses, at least one, in the order in which
// to try them: at random, those that failed last.
func (p *Pool) addresses(ctx context.Context, e *endpoint) ([]netip.AddrPort, error) {
	port, err := strconv.ParseUint(e.port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("read port of %s: %w", e.address, err)
	}
	answer, err := p.o.Resolver.Lookup(ctx, e.host)
	if err != nil {
		return nil, err
	}
	if len(answer.Addrs) == 0 {
		return nil, fmt.Errorf("resolve %s: no address", e.host)
	}
	addrs := slices.Clone(answer.Addrs)
	shuffle(addrs)
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := range e.failed {
		if !slices.Contains(addrs, a) {
			delete(e.failed, a)
		}
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for _, failed := range []bool{false, true} {
		for _, a := range addrs {
			if e.failed[a] == failed {
				out = append(out, netip.AddrPortFrom(a, uint16(port)))
			}
		}
	}
	return out, nil
}

// learn keeps how connecting to one address of an endpoint went: well if err is
// nil, and then how quickly.
func (p *Pool) learn(e *endpoint, a netip.Addr, took time.Duration, err error) {
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
