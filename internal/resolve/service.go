package resolve

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
	"sync"
	"time"

	"github.com/miekg/dns"
)

// servicePrefix marks an endpoint that is the name of SRV records.
const servicePrefix = "srv:"

// maxTargets is how many servers of a service are looked up: each costs two
// questions. Those of the first priorities count.
const maxTargets = 32

// A target is one SRV record.
type target struct {
	host             string // absolute, in lower case: the search list is not for it
	port             uint16
	priority, weight uint16
}

// IsService reports whether an endpoint is of the form "srv:NAME".
func IsService(endpoint string) bool { return strings.HasPrefix(endpoint, servicePrefix) }

// Addresses returns what an endpoint, "host:port" or "srv:NAME", means: at least
// one address, and none twice. Those of a host are in no particular order; those
// of a service in the order in which to try them, by its records' priorities, and
// at random by their weights, anew each time. Names are looked up as by Lookup,
// with its errors. The slice is the caller's.
func (r *Resolver) Addresses(ctx context.Context, endpoint string) ([]netip.AddrPort, error) {
	if name, ok := strings.CutPrefix(endpoint, servicePrefix); ok {
		return r.service(ctx, name)
	}
	host, port, err := split(endpoint)
	if err != nil {
		return nil, err
	}
	answer, err := r.Lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	return appendPort(make([]netip.AddrPort, 0, len(answer.Addrs)), answer.Addrs, port), nil
}

// Known returns what is known of an endpoint, as Addresses would, without asking
// anybody; it may be nothing, or have expired.
func (r *Resolver) Known(endpoint string) []netip.AddrPort {
	name, service := strings.CutPrefix(endpoint, servicePrefix)
	if !service {
		host, port, err := split(endpoint)
		if err != nil {
			return nil
		}
		return appendPort(nil, r.knownHost(host), port)
	}
	r.mu.Lock()
	var targets []target
	if e := r.names[query{name, true}]; e != nil {
		targets = e.answer.targets
	}
	r.mu.Unlock()
	var out []netip.AddrPort
	for _, t := range targets {
		out = appendPort(out, r.knownHost(t.host), t.port)
	}
	return out
}

func (r *Resolver) knownHost(host string) []netip.Addr {
	if a, ok := r.unasked(host); ok {
		return a.Addrs
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.names[query{name: host}]; e != nil {
		return e.answer.Addrs
	}
	return nil
}

func split(endpoint string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(endpoint)
	if err != nil {
		return "", 0, fmt.Errorf("read address: %w", err)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("read port of %s: %w", endpoint, err)
	}
	return host, uint16(n), nil
}

// appendPort adds addresses that are not there yet.
func appendPort(to []netip.AddrPort, addrs []netip.Addr, port uint16) []netip.AddrPort {
	for _, a := range addrs {
		if ap := netip.AddrPortFrom(a, port); !slices.Contains(to, ap) {
			to = append(to, ap)
		}
	}
	return to
}

// service looks a service's targets up, and then their addresses.
func (r *Resolver) service(ctx context.Context, name string) ([]netip.AddrPort, error) {
	answer, err := r.lookup(ctx, query{name, true})
	if err != nil {
		return nil, err
	}
	targets := inTurn(answer.targets)
	hosts, err := r.hostsOf(ctx, targets)
	var out []netip.AddrPort
	for i, t := range targets {
		addrs := hosts[i]
		rand.Shuffle(len(addrs), func(a, b int) { addrs[a], addrs[b] = addrs[b], addrs[a] }) //nolint:gosec // spreads load
		out = appendPort(out, addrs, t.port)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("resolve targets of %s%s: %w", servicePrefix, name, err)
	}
	return out, nil
}

// hostsOf looks up all targets at the same time. When one is known, the others
// have otherWait: one name that nobody answers for holds up no other. Those that
// are late serve the next call. The error is that of a target that may come back,
// if there is one, since one that does not exist says nothing about the rest.
func (r *Resolver) hostsOf(ctx context.Context, targets []target) ([][]netip.Addr, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	enough := time.AfterFunc(questionTimeout, cancel)
	defer enough.Stop()
	hosts, errs := make([][]netip.Addr, len(targets)), make([]error, len(targets))
	var all sync.WaitGroup
	var first sync.Once
	for i, t := range targets {
		all.Go(func() {
			a, ok := r.unasked(t.host)
			if !ok {
				a, errs[i] = r.lookup(ctx, query{name: t.host})
			}
			if errs[i] == nil {
				hosts[i] = slices.Clone(a.Addrs)
				first.Do(func() { enough.Reset(otherWait) })
			}
		})
	}
	all.Wait()
	var last error
	for _, err := range errs {
		if last == nil || err != nil && errors.Is(last, errNoAddress) {
			last = err
		}
	}
	return hosts, last
}

// inTurn returns targets, which are in the order of their priorities, as RFC 2782
// has them tried: those of one priority at random, each with a chance that its
// weight gives it.
func inTurn(targets []target) []target {
	out := slices.Clone(targets)
	for from := 0; from < len(out); {
		same := out[from:]
		if next := slices.IndexFunc(same, func(t target) bool { return t.priority != same[0].priority }); next >= 0 {
			same = same[:next]
		}
		from += len(same)
		for ; len(same) > 1; same = same[1:] {
			pick := weighted(same)
			same[0], same[pick] = same[pick], same[0]
		}
	}
	return out
}

// weighted picks one of several targets. Those of weight 0 have a very small
// chance beside others, and an equal one among themselves.
func weighted(targets []target) int {
	const scale = 1 << 10 // what a weight of 1 is worth beside one of 0
	share := func(t target) int64 { return max(int64(t.weight)*scale, 1) }
	var sum int64
	for _, t := range targets {
		sum += share(t)
	}
	at := rand.N(sum) //nolint:gosec // spreads load
	for i, t := range targets {
		if at -= share(t); at < 0 {
			return i
		}
	}
	return 0
}

// targets asks for the SRV records of a name.
func (r *Resolver) targets(ctx context.Context, config *dns.ClientConfig, name string) (reply, error) {
	answer, err := r.one(ctx, config, name, dns.TypeSRV)
	if err != nil {
		return reply{}, err
	}
	var found reply
	ttl, declined := MaxTTL, false
	for _, rr := range answer.Answer {
		switch rr := rr.(type) {
		case *dns.SRV:
			if rr.Target == "." {
				declined = true
			} else if rr.Port != 0 { // nothing can be dialled there
				found.targets = append(found.targets, target{strings.ToLower(rr.Target), rr.Port, rr.Priority, rr.Weight})
			}
		case *dns.CNAME:
		default:
			continue
		}
		ttl = min(ttl, time.Duration(rr.Header().Ttl)*time.Second)
	}
	if len(found.targets) == 0 {
		if declined {
			return reply{}, errDeclined
		}
		return reply{}, errNoService
	}
	slices.SortStableFunc(found.targets, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(b.weight, a.weight))
	})
	found.targets = found.targets[:min(len(found.targets), maxTargets)]
	found.Expires = time.Now().Add(max(ttl, MinTTL))
	return found, nil
}
