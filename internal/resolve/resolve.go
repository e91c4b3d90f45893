// Package resolve turns host names into addresses and knows for how long they
// are valid, which Go's own resolver hides.
//
//	r := resolve.New(resolve.Options{})
//	defer r.Close()
//	answer, err := r.Lookup(ctx, "gw.dc2.example")
//	...
//	r.Forget("gw.dc2.example") // a dial failed: ask again at the next Lookup
//
// A literal address is itself, the hosts file comes next, and then the name
// servers of resolv.conf, asked for A and AAAA records over UDP, and over TCP
// where an answer is cut (RFC 1035 section 4.2, RFC 7766). Both files are read
// again when they change.
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
	"net/netip"
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
	names  map[string]*entry
}

// An entry is one name. Names come from the configuration, so their number is
// bounded by it.
type entry struct {
	answer Answer    // the last good one
	err    error     // how the last question ended, nil if well
	asked  time.Time // when that was
	flight *flight   // the question under way, or nil
}

// A flight is one question under way.
type flight struct {
	began time.Time
	ended chan struct{} // closed after its entry was updated
}

// New returns a Resolver that has asked nothing yet.
func New(o Options) *Resolver {
	if o.HostsFile == "" {
		o.HostsFile = "/etc/hosts"
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	r := &Resolver{timeout: o.Timeout, exchange: overNetwork, names: make(map[string]*entry)}
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
	errClosed    = errors.New("the resolver is closed")
)

// Lookup returns the addresses of a host. It asks only when it has no answer
// that is valid. While it has one that was, it waits for a moment only and
// returns that if asking fails or takes long. The error is a [*NameError], or
// ctx's.
func (r *Resolver) Lookup(ctx context.Context, host string) (Answer, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return Answer{Addrs: []netip.Addr{a.Unmap()}}, nil
	}
	if addrs := r.hosts.lookup(host); len(addrs) > 0 {
		return Answer{Addrs: addrs, Expires: time.Now().Add(MinTTL)}, nil
	}
	e := r.claim(host)
	if e.flight == nil {
		return e.result(host)
	}
	var patience <-chan time.Time
	if len(e.answer.Addrs) > 0 {
		t := time.NewTimer(staleWait - time.Since(e.flight.began))
		defer t.Stop()
		patience = t.C
	}
	select {
	case <-e.flight.ended:
		return r.known(host).result(host)
	case <-patience:
		return Answer{Addrs: e.answer.Addrs, Expires: time.Now()}, nil
	case <-ctx.Done():
		return Answer{}, fmt.Errorf("resolve %s: %w", host, ctx.Err())
	}
}

// claim returns a copy of a name's entry. Unless that is fresh, a question is
// under way.
func (r *Resolver) claim(host string) entry {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[host]
	if e == nil {
		e = &entry{}
		r.names[host] = e
	}
	switch {
	case e.flight != nil, e.fresh(now):
	case r.closed:
		e.err, e.asked = errClosed, now
	default:
		e.flight = &flight{began: now, ended: make(chan struct{})}
		r.running.Go(func() { r.ask(host) })
	}
	return *e
}

// fresh tells whether there is no need to ask: the answer is valid, or asking
// failed a moment ago.
func (e *entry) fresh(now time.Time) bool {
	return now.Before(e.answer.Expires) || e.err != nil && now.Sub(e.asked) < askEvery
}

func (r *Resolver) known(host string) entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return *r.names[host]
}

func (e entry) result(host string) (Answer, error) {
	if len(e.answer.Addrs) == 0 {
		return Answer{}, &NameError{host, e.err}
	}
	if e.err != nil { // stale, and good enough until the next question
		return Answer{Addrs: e.answer.Addrs, Expires: e.asked.Add(askEvery)}, nil
	}
	return e.answer, nil
}

// ask puts the question that claim has begun, and stores how it ended.
func (r *Resolver) ask(host string) {
	ctx, cancel := context.WithTimeout(r.ctx, questionTimeout)
	defer cancel()
	reply, err := r.question(ctx, host)
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[host]
	e.err, e.asked = err, time.Now()
	if err == nil {
		for _, a := range e.answer.Addrs {
			if a.Is4() && reply.no4 || a.Is6() && reply.no6 {
				reply.Addrs = append(reply.Addrs, a)
			}
		}
		e.answer = reply.Answer
	}
	close(e.flight.ended)
	e.flight = nil
}

// Forget makes the next Lookup ask again, a second after the last question at
// the earliest: the name's addresses do not work, and may have changed.
func (r *Resolver) Forget(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[host]
	if e == nil {
		return
	}
	if next := e.asked.Add(askEvery); next.Before(e.answer.Expires) {
		e.answer.Expires = next
	}
}
