package packet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	// warmFor is how long after a packet a broken connection is dialled again without waiting for the next one.
	warmFor = 10 * time.Second

	// Between dials that packets wait for.
	shortestBackoff = 50 * time.Millisecond
	longestBackoff  = time.Second

	// Between dials that nobody waits for. The higher side lets the lower one go first, so that most connections are
	// dialled once.
	shortestQuiet = time.Second
	higherQuiet   = 3 * time.Second
	longestQuiet  = 2 * time.Minute
)

// redials is when a link dials. Its methods are the link's, and called with its mutex held.
type redials struct {
	cancel    context.CancelCauseFunc // of the dial in progress, else nil
	retry     *time.Timer             // of the next dial, nil before the first
	hurried   bool                    // that comes as soon as it may: packets wait
	notBefore time.Time               // when it may come
	delay     time.Duration           // backoff while packets wait
	quiet     time.Duration           // backoff while none do
	lower     bool
	plain     bool // the peer is known not to send both ways: nothing is gained by being connected
}

// reset begins all backoffs anew.
func (r *redials) reset(lower bool) {
	r.lower, r.delay, r.quiet = lower, shortestBackoff, shortestQuiet
	if !lower {
		r.quiet = higherQuiet
	}
}

// isWarm says whether the link is to be connected also when nobody sends anything.
func (l *Link) isWarm() bool { return l.o.Deliver != nil && !l.plain }

// isUsed says whether a packet waits, or one was sent so lately that the next is due.
func (l *Link) isUsed(now time.Time) bool {
	l.expire(now)
	return l.queue.n > 0 || now.Sub(l.lastSend) < min(warmFor, l.o.IdleTimeout)
}

// canDial says whether a dial makes sense now.
func (l *Link) canDial() bool {
	return l.ctx != nil && !l.stopped && l.to == nil && l.cancel == nil && l.ending == 0
}

// plan arranges the next dial after the end of a dial or connection, if one is wanted: at once after one that was
// stable, if the link is in use.
func (l *Link) plan(stable bool) {
	if !l.canDial() {
		return
	}
	now := time.Now()
	l.notBefore = now
	if stable {
		l.reset(l.lower)
	} else {
		l.notBefore = now.Add(jitter(l.delay))
		l.delay = min(2*l.delay, longestBackoff)
	}
	switch {
	case l.isUsed(now):
		l.hurry()
	case l.isWarm():
		l.arm(jitter(l.quiet))
		l.quiet = min(2*l.quiet, longestQuiet)
	default:
		l.queue.trim()
	}
}

// hurry makes the next dial come as soon as it may.
func (l *Link) hurry() {
	if l.hurried || !l.canDial() {
		return
	}
	l.hurried = true
	l.arm(time.Until(l.notBefore))
}

func (l *Link) arm(wait time.Duration) {
	if wait <= 0 {
		if l.retry != nil {
			l.retry.Stop()
		}
		l.wg.Go(l.redial)
		return
	}
	if l.retry == nil {
		l.retry = time.AfterFunc(wait, l.redial)
		return
	}
	l.retry.Reset(wait)
}

// disarm takes back a dial that is arranged.
func (l *Link) disarm() {
	l.hurried = false
	if l.retry != nil {
		l.retry.Stop()
	}
}

// redial dials once. What the handshake needs of its goroutine's stack goes with it: the connection's reader is another
// one.
func (l *Link) redial() {
	ctx, ok := l.beginDial()
	if !ok {
		return
	}
	defer l.wg.Done()
	c, err := l.dialOnce(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel(nil)
	l.cancel = nil
	switch {
	case err == nil && (l.stopped || l.to != nil): // the peer was quicker
		s := newSession(l, c)
		s.dialled = true
		s.retire(retireTimeout)
		l.wg.Go(func() { s.run() })
	case err == nil:
		s := newSession(l, c)
		s.dialled = true
		s.blank = c.Coalesce() && l.o.Deliver != nil
		l.enter(s)
		l.wg.Go(func() { s.run() })
		l.flush()
	case l.to == nil && !l.stopped:
		l.failed(stateDown, fmt.Errorf("dial: %w", err))
		l.plan(false)
	}
}

func (l *Link) beginDial() (context.Context, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.canDial() {
		return nil, false
	}
	l.hurried = false
	if !l.isWarm() && !l.isUsed(time.Now()) {
		l.queue.trim()
		return nil, false
	}
	if l.state != stateDown { // down stays down until the next is up
		l.setState(stateDialing)
	}
	ctx, cancel := context.WithCancelCause(l.ctx)
	l.cancel = cancel
	l.wg.Add(1)
	return ctx, true
}

func (l *Link) dialOnce(ctx context.Context) (Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.DialTimeout)
	defer cancel()
	return l.dial(ctx)
}

// jitter spreads the redials of many links over the second half of d.
func jitter(d time.Duration) time.Duration { return d/2 + spread(d/2) }

// spread is any time of d.
func spread(d time.Duration) time.Duration {
	return rand.N(d) //nolint:gosec // spreads load, guards nothing
}
