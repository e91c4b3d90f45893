// Package resolve turns host names into addresses and knows for how long they
// are valid, which Go's own resolver hides.
//
//	r := resolve.New(resolve.Options{})
//	defer r.Close()
//	addrs, err := r.Addresses(ctx, "gw.dc2.example:8443")
//	...
//	r.Forget("gw.dc2.example:8443") // dials failed: ask again the next time
//
// A literal address is itself, the hosts file comes next, and then the name
// servers of resolv.conf, asked for A and AAAA records over UDP, and over TCP
// where an answer is cut (RFC 1035 section 4.2, RFC 7766). Both files are read
// again when they change. An endpoint "srv:NAME" is what the SRV records of that
// name lead to (RFC 2782): their ports, and their targets' addresses.
//
// Answers are kept for as long as they are valid. Name servers that are away
// take nothing away that works: the last good answer goes on serving, and a
// Lookup hardly waits for a better one. That is why a question goes on when the
// Lookup that caused it has returned: it ends by itself within a bounded time,
// or by Close. One question a name is under way at a time. A [Resolver] is for
// any number of goroutines.
package resolve

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// MinTTL is how long an answer is kept at least, whatever it says.
	MinTTL = time.Second
	// MaxTTL is how long an answer is kept at most.
	MaxTTL = 5 * time.Minute

	// askEvery is how often a name is asked for again at most because of Forget
	// or of a failure.
	askEvery = time.Second
	// staleWait is how long the start of a question holds up those who have an
	// answer that has expired. It is less than what a dial gives one candidate
	// before it tries the next, so that slow name servers make no endpoint slow.
	staleWait = 100 * time.Millisecond
	// questionTimeout bounds a question to all servers with all their retries.
	questionTimeout = 10 * time.Second
	// maxTimeout caps what resolv.conf says of one question to one server: its
	// default of 5 s is longer than anybody here waits.
	maxTimeout = 2 * time.Second
	// manyNames is how many names are kept whether they are looked up or not.
	// Beyond, what nobody has looked up for unusedFor is forgotten.
	manyNames = 1000
	unusedFor = time.Hour
)

// Options configure a [Resolver].
type Options struct {
	HostsFile  string        // "" means /etc/hosts
	ResolvConf string        // "" means /etc/resolv.conf
	Timeout    time.Duration // for one question to one server; 0 means resolv.conf's, 2 s at most
}

// An Answer is what a name means at the moment.
type Answer struct {
	Addrs   []netip.Addr // at least one; not to be changed
	Expires time.Time    // zero: never

	targets []target // of a service, which has no addresses of its own
}

func (a Answer) empty() bool { return len(a.Addrs)+len(a.targets) == 0 }

// A query is what is asked of the name servers: the addresses of a host, or the
// targets of a service.
type query struct {
	name    string
	service bool
}

// A Resolver looks names up. Make one with [New].
type Resolver struct {
	hosts    hostsFile
	servers  serversFile
	timeout  time.Duration
	exchange func(ctx context.Context, m *dns.Msg, server string, timeout time.Duration) (*dns.Msg, error)

	ctx     context.Context // of the questions; Close ends it
	stop    context.CancelFunc
	running sync.WaitGroup // the questions

	mu     sync.Mutex
	closed bool
	names  map[query]*entry
}

// An entry is one name.
type entry struct {
	answer Answer    // the last good one
	err    error     // how the last question ended, nil if well
	asked  time.Time // when that was
	used   time.Time // when it was last looked up
	flight *flight   // the question under way, or nil
}

// A flight is one question under way.
type flight struct {
	began time.Time
	ended chan struct{} // closed after the question
	entry entry         // what is known then; to be read once ended is closed
}

// New returns a Resolver that has asked nothing yet.
func New(o Options) *Resolver {
	if o.HostsFile == "" {
		o.HostsFile = "/etc/hosts"
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	r := &Resolver{timeout: o.Timeout, exchange: overNetwork, names: make(map[query]*entry)}
	r.hosts.path, r.servers.path = o.HostsFile, o.ResolvConf
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r
}

// Close ends the questions that are under way and waits for them. Afterwards
// only what is known is answered. It is safe to call twice.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.stop()
	r.running.Wait()
}

// A NameError is a name that has no address, or whose servers did not answer.
type NameError struct {
	Name string
	Err  error
}

func (e *NameError) Error() string { return fmt.Sprintf("resolve %s: %v", e.Name, e.Err) }

// Unwrap returns Err.
func (e *NameError) Unwrap() error { return e.Err }

var (
	errNoAddress = errors.New("no address")
	errNoService = errors.New("no such service")
	errDeclined  = errors.New("its record says that there is no such service")
	errClosed    = errors.New("the resolver is closed")
)

// Lookup returns the addresses of a host. It asks only when it has no answer
// that is valid. While it has one that was, it waits for a moment only and
// returns that if asking fails or takes long. The error is a [*NameError], or
// ctx's.
func (r *Resolver) Lookup(ctx context.Context, host string) (Answer, error) {
	if a, ok := r.unasked(host); ok {
		return a, nil
	}
	return r.lookup(ctx, query{name: host})
}

// unasked is what is known of a host without any name server.
func (r *Resolver) unasked(host string) (Answer, bool) {
	if a, err := netip.ParseAddr(host); err == nil {
		return Answer{Addrs: []netip.Addr{a.Unmap()}}, true
	}
	if addrs := r.hosts.lookup(host); len(addrs) > 0 {
		return Answer{Addrs: addrs, Expires: time.Now().Add(MinTTL)}, true
	}
	return Answer{}, false
}

// lookup is Lookup for what only name servers know.
func (r *Resolver) lookup(ctx context.Context, q query) (Answer, error) {
	e := r.claim(q)
	if e.flight == nil {
		return e.result(q)
	}
	var patience <-chan time.Time
	if !e.answer.empty() {
		t := time.NewTimer(staleWait - time.Since(e.flight.began))
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-e.flight.ended:
		return e.flight.entry.result(q)
	case <-patience:
		e.answer.Expires = time.Now()
		return e.answer, nil
	case <-ctx.Done():
		return Answer{}, fmt.Errorf("resolve %s: %w", q.name, ctx.Err())
	}
}

// claim returns a copy of a name's entry. Unless that is fresh, a question is
// under way.
func (r *Resolver) claim(q query) entry {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[q]
	if e == nil {
		r.sweep(now)
		e = &entry{}
		r.names[q] = e
	}
	e.used = now
	switch {
	case e.flight != nil, e.fresh(now):
	case r.closed:
		e.err, e.asked = errClosed, now
	default:
		e.flight = &flight{began: now, ended: make(chan struct{})}
		r.running.Go(func() { r.ask(q) })
	}
	return *e
}

// sweep makes room for one more name. Names come from the configuration, but also
// from other datacenters and from SRV records, which may name others each day.
// Called with mu held.
func (r *Resolver) sweep(now time.Time) {
	if len(r.names) < manyNames {
		return
	}
	maps.DeleteFunc(r.names, func(_ query, e *entry) bool { return e.flight == nil && now.Sub(e.used) >= unusedFor })
}

// fresh tells whether there is no need to ask: the answer is valid, or asking
// failed a moment ago.
func (e *entry) fresh(now time.Time) bool {
	return now.Before(e.answer.Expires) || e.err != nil && now.Sub(e.asked) < askEvery
}

func (e entry) result(q query) (Answer, error) {
	if e.answer.empty() {
		return Answer{}, &NameError{q.name, e.err}
	}
	if e.err != nil { // stale, and good enough until the next question
		e.answer.Expires = e.asked.Add(askEvery)
	}
	return e.answer, nil
}

// ask puts the question that claim has begun, and stores how it ended.
func (r *Resolver) ask(q query) {
	ctx, cancel := context.WithTimeout(r.ctx, questionTimeout)
	defer cancel()
	reply, err := r.question(ctx, q)
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[q]
	e.err, e.asked = err, time.Now()
	if err == nil {
		for _, a := range e.answer.Addrs {
			if a.Is4() && reply.no4 || a.Is6() && reply.no6 {
				reply.Addrs = append(reply.Addrs, a)
			}
		}
		e.answer = reply.Answer
	}
	f := e.flight
	e.flight = nil
	f.entry = *e
	close(f.ended)
}

// Forget makes the next Addresses of an endpoint, or the next Lookup of a host,
// ask again, a second after the last question at the earliest: the addresses do
// not work, and may have changed.
func (r *Resolver) Forget(endpoint string) {
	name, service := strings.CutPrefix(endpoint, servicePrefix)
	if host, _, err := net.SplitHostPort(endpoint); err == nil && !service {
		name = host
	}
	q := query{name, service}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire(q)
	if e := r.names[q]; e != nil {
		for _, t := range e.answer.targets {
			r.expire(query{name: t.host})
		}
	}
}

// expire lets an answer end a second after it was asked for. Called with mu held.
func (r *Resolver) expire(q query) {
	e := r.names[q]
	if e == nil {
		return
	}
	if next := e.asked.Add(askEvery); next.Before(e.answer.Expires) {
		e.answer.Expires = next
	}
}
