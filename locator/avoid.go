package locator

import (
	"errors"
	"maps"
	"time"

	"culvert/catalog"
)

// A gateway behind which a peer was not reached is avoided for that peer for
// avoidFor, and twice as long with each failure that follows before the peer is
// reached, up to avoidMost. One that takes connections and says nothing costs a
// whole handshake's time: with several of these the first one would be forgiven
// before the last one was tried, and what comes after them would never be.
const (
	avoidFor  = 10 * time.Second
	avoidMost = 2 * time.Minute
)

// An avoidance is what led nowhere for one peer.
type avoidance struct {
	until map[string]time.Time // by address as configured
	span  time.Duration        // of the newest; 0 once the peer was reached
}

// failed adds a failure. Several at a time are one: they have met the same thing.
func (a *avoidance) failed(gateway string, now time.Time) {
	if a.over(now) {
		a.span = 0
	}
	if !now.Before(a.until[gateway]) {
		a.span = min(max(avoidFor, 2*a.span), avoidMost)
	}
	a.until[gateway] = now.Add(max(a.span, avoidFor))
}

// over tells that all of it is so long ago that it counts no more.
func (a *avoidance) over(now time.Time) bool {
	for _, until := range a.until {
		if now.Sub(until) < avoidMost {
			return false
		}
	}
	return true
}

// An answered error says of itself that it is the answer of whoever the path led
// to.
type answered interface {
	error
	Answered() bool
}

// Report tells how a connection fared after it had been dialled: err, or nil if
// the peer itself answered. A gateway behind which a peer was not reached is
// tried later for that peer for ten seconds, and for longer the more failures
// follow each other.
//
// An error with a method Answered that returns true is a peer that was reached and
// refuses. It counts neither against the path, as others lead to the same peer, nor
// for it, as who refuses has not proved who it is. Where any server of a datacenter
// will do it counts as a failure: the next one may not refuse.
func (l *Locator) Report(to catalog.Key, path Path, err error) {
	var why answered
	if path.Gateway == "" || to.Node != "" && errors.As(err, &why) && why.Answered() {
		return
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.avoid[to]
	if err == nil {
		if a != nil {
			a.span = 0
			delete(a.until, path.Gateway)
		}
		return
	}
	if !l.seen.Knows(to.Datacenter) {
		return // it left meanwhile
	}
	if !has(l.seen, to) { // the catalog does not bound their number
		maps.DeleteFunc(l.avoid, func(_ catalog.Key, a *avoidance) bool { return a.over(now) })
	}
	if a = l.avoid[to]; a == nil {
		a = &avoidance{until: make(map[string]time.Time)}
		l.avoid[to] = a
	}
	a.failed(path.Gateway, now)
}

// avoided tells which gateways to try later for a peer, and until when. Called
// with mu held.
func (l *Locator) avoided(to catalog.Key) map[string]time.Time {
	a := l.avoid[to]
	if a == nil {
		return nil
	}
	now := time.Now()
	if a.over(now) {
		delete(l.avoid, to)
		return nil
	}
	bad := make(map[string]time.Time)
	for gateway, until := range a.until {
		if now.Before(until) {
			bad[gateway] = until
		} else if now.Sub(until) >= avoidMost {
			delete(a.until, gateway)
		}
	}
	return bad
}
