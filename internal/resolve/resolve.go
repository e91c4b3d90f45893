// Package resolve turns host names into addresses and knows for how long they
// are valid, which Go's own resolver hides.
//
//	r := resolve.New(resolve.Options{})
//	answer, err := r.Lookup(ctx, "gw.dc2.example")
//	...
//	r.Forget("gw.dc2.example") // a dial failed: ask again at the next Lookup
//
// A literal address is itself, the hosts file comes next, and then the name
// servers of resolv.conf, asked for A and AAAA records over UDP, and over TCP
// where an answer is cut (RFC 1035 section 4.2, RFC 7766). Both files are read
// again when they change.
//
// Answers are kept for as long as they are valid. When a name cannot be asked
// for, its last good answer goes on serving: name servers that are away take
// nothing away that works. One question a name is under way at a time. A
// [Resolver] is for any number of goroutines, and starts none that outlives the
// call.
package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

const (
	// MinTTL and MaxTTL bound how long an answer is kept, whatever it says.
	MinTTL = time.Second
	MaxTTL = 5 * time.Minute

	// forgetEvery is how often a name is asked for again at most because of
	// Forget or of a failure.
	forgetEvery = time.Second

	defaultTimeout = 2 * time.Second
)

// Options configure a [Resolver].
type Options struct {
	HostsFile  string        // "" means /etc/hosts
	ResolvConf string        // "" means /etc/resolv.conf
	Timeout    time.Duration // for one question to one server; 0 means 2 s
}

// An Answer is what a name means at the moment.
type Answer struct {
	Addrs   []netip.Addr // at least one; not to be changed
	Expires time.Time    // zero: never
}

// A Resolver looks names up. Make one with [New].
type Resolver struct {
	hosts   hostsFile
	servers serversFile
	timeout time.Duration

	mu    sync.Mutex
	names map[string]*entry
}

// An entry is one name. Names come from the configuration, so their number is
// bounded by it.
type entry struct {
	answer Answer    // the last good one
	asked  time.Time // when the last question ended
	err    error     // how, nil if well
	asking chan struct{}
}

// New returns a Resolver that has asked nothing yet.
func New(o Options) *Resolver {
	if o.HostsFile == "" {
		o.HostsFile = "/etc/hosts"
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	r := &Resolver{timeout: o.Timeout, names: make(map[string]*entry)}
	r.hosts.path, r.servers.path = o.HostsFile, o.ResolvConf
	return r
}

// A NameError is a name that has no address, or whose servers did not answer.
type NameError struct {
	Name string
	Err  error
}

func (e *NameError) Error() string { return fmt.Sprintf("resolve %s: %v", e.Name, e.Err) }

// Unwrap returns Err.
func (e *NameError) Unwrap() error { return e.Err }

// Lookup returns the addresses of a host. It asks only when it has no answer
// that is valid, and then returns the last good one if asking fails. The error
// is a [*NameError], or ctx's.
func (r *Resolver) Lookup(ctx context.Context, host string) (Answer, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return Answer{Addrs: []netip.Addr{a.Unmap()}}, nil
	}
	if addrs := r.hosts.lookup(host); len(addrs) > 0 {
		return Answer{Addrs: addrs, Expires: time.Now().Add(MinTTL)}, nil
	}
	for {
		e, wait := r.claim(host)
		switch {
		case wait != nil: // someone else asks
		case e.asking != nil:
			return r.ask(ctx, host, e.asking)
		default:
			return e.result(host)
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return Answer{}, fmt.Errorf("resolve %s: %w", host, ctx.Err())
		}
	}
}

// claim returns a copy of a name's entry if it is fresh. Otherwise the caller
// is to ask (its asking channel is set), or to wait for whoever does.
func (r *Resolver) claim(host string) (e entry, wait <-chan struct{}) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.names[host]
	if known == nil {
		known = &entry{}
		r.names[host] = known
	}
	switch {
	case known.asking != nil:
		return entry{}, known.asking
	case known.fresh(now):
		return *known, nil
	}
	known.asking = make(chan struct{})
	return *known, nil
}

// fresh tells whether there is no need to ask: the answer is valid, or asking
// failed a moment ago.
func (e *entry) fresh(now time.Time) bool {
	return now.Before(e.answer.Expires) || e.err != nil && now.Sub(e.asked) < forgetEvery
}

func (e *entry) result(host string) (Answer, error) {
	if len(e.answer.Addrs) == 0 {
		return Answer{}, &NameError{host, e.err}
	}
	if e.err != nil { // stale, and good enough until the next question
		return Answer{Addrs: e.answer.Addrs, Expires: e.asked.Add(forgetEvery)}, nil
	}
	return e.answer, nil
}

// ask puts the question and stores how it ended. A question that ended because
// its asker gave up is nobody's answer: whoever waits asks again.
func (r *Resolver) ask(ctx context.Context, host string, asking chan struct{}) (Answer, error) {
	answer, err := r.question(ctx, host)
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.names[host]
	e.asking = nil
	close(asking)
	if err != nil && ctx.Err() != nil {
		if len(e.answer.Addrs) == 0 {
			return Answer{}, fmt.Errorf("resolve %s: %w", host, ctx.Err())
		}
		return Answer{Addrs: e.answer.Addrs, Expires: time.Now()}, nil
	}
	e.err, e.asked = err, time.Now()
	if err == nil {
		e.answer = answer
	}
	return e.result(host)
}

// Forget makes the next Lookup ask again, unless the name was asked for within
// the last second: its addresses do not work, and may have changed.
func (r *Resolver) Forget(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.names[host]; e != nil && time.Since(e.asked) >= forgetEvery {
		e.answer.Expires = time.Time{}
	}
}

var errNoAddress = errors.New("no address")
