package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/stream/session"
)

// The rules by which streams share sessions, see docs/decisions/0009-sessions.md.
const (
	// settledAfter and settledBytes are when a stream is no longer a short one: its
	// session takes no others, so that they do not wait behind it nor end with it.
	settledAfter = 5 * time.Second
	settledBytes = 256 << 10
	// maxShared is how many short streams share a session at once.
	maxShared = 32
	// maxSessions bounds the sessions to one peer. Where all are taken, a stream
	// gets a connection of its own.
	maxSessions = 16
	// keptFor is how long a session is kept for streams to come, and spareFor how
	// long after one a session that others have taken is replaced, so that the next
	// stream does not wait for a dial.
	keptFor  = 10 * time.Minute
	spareFor = 2 * time.Minute
	// maxWarm is up to how many peers a session is kept with each from the start.
	// With more of them a peer's first stream waits for its dial.
	maxWarm = 64

	minBackoff = time.Second
	maxBackoff = 30 * time.Second
	// pingAfter is how long a peer may be silent before it is asked for a sign of
	// life, and doubtAfter how long that may take before no more streams are put
	// on the session.
	pingAfter  = 15 * time.Second
	doubtAfter = 3 * time.Second
	// carrierTick is how often all of this is looked at.
	carrierTick = time.Second
)

// carriers are the sessions that the streams to peers ride on. While they do not
// run, streams get connections of their own.
type carriers struct {
	peers   func() []catalog.Key
	dial    DialPeer
	timeout time.Duration // of a session's pings and writes
	log     *zap.Logger
	m       *Metrics

	mu    sync.Mutex
	pools map[catalog.Key]*pool
	ctx   context.Context // run's; nil before it and after
	wg    sync.WaitGroup
}

// A pool is what there is for one peer.
type pool struct {
	dialing chan struct{} // closed when the dial of a session in progress has ended; nil without one
	plain   bool          // the peer chose another protocol than a session the last time, or has none
	warm    bool          // a session is kept whether streams come or not
	used    time.Time     // a stream was wanted
	retry   time.Time     // a spare is not dialled before
	backoff time.Duration
	all     []*carrier
}

// A carrier is one session. Its fields are under the carriers' mutex.
type carrier struct {
	*session.Session
	used    time.Time // it had a stream
	pinged  time.Time // a ping is under way since; zero for none
	useless bool      // it takes no more streams
}

func newCarriers(peers func() []catalog.Key, dial DialPeer, log *zap.Logger, m *Metrics) *carriers {
	return &carriers{peers: peers, dial: dial, timeout: session.DefaultTimeout, log: log, m: m, pools: make(map[catalog.Key]*pool)}
}

// reach returns a connection for a stream: a stream of a session that there is or
// that is dialled for it, or what the peer has instead.
func (cs *carriers) reach(ctx context.Context, to catalog.Key, want Wanted) (Reached, error) {
	for {
		c, wait, turn := cs.find(to)
		switch {
		case c != nil:
			if st, err := c.Open(want.Service); err == nil {
				return Reached{Conn: st}, nil
			}
			cs.discard(c)
			continue
		case wait != nil:
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return Reached{}, ctx.Err()
			}
		}
		want.Session = turn
		r, err := cs.dial(ctx, to, want)
		if !turn {
			return r, err
		}
		c, err = cs.dialled(to, r, err)
		switch {
		case err != nil:
			return Reached{}, err
		case c == nil:
			return r, nil
		}
		// The stream for which it was dialled goes first: otherwise the others
		// that wait could use the session up.
		st, err := c.Open(want.Service)
		cs.share(to)
		if err != nil {
			return Reached{}, err
		}
		return Reached{Conn: st}, nil
	}
}

// find returns a session that takes a stream, or what to wait for while one is
// dialled. Otherwise the caller is to dial, and if it is its turn for a session, to
// call dialled and share.
func (cs *carriers) find(to catalog.Key) (c *carrier, wait <-chan struct{}, turn bool) {
	now := time.Now()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.ctx == nil {
		return nil, nil, false
	}
	p := cs.pool(to)
	p.used = now
	if c := p.free(now); c != nil {
		c.used = now
		return c, nil, false
	}
	switch {
	case p.dialing != nil && !p.plain:
		return nil, p.dialing, false
	case p.dialing != nil, len(p.all) >= maxSessions:
		return nil, nil, false
	}
	p.dialing = make(chan struct{})
	return nil, nil, true
}

// pool returns a peer's, and makes one. Called with mu held.
func (cs *carriers) pool(of catalog.Key) *pool {
	p := cs.pools[of]
	if p == nil {
		p = &pool{backoff: minBackoff}
		cs.pools[of] = p
	}
	return p
}

// dialled makes a session of what a dial came to, nil where the peer chose another
// protocol. Where it returns none, what was dialled is shared already.
func (cs *carriers) dialled(to catalog.Key, r Reached, err error) (*carrier, error) {
	if err != nil {
		cs.share(to)
		return nil, err
	}
	if !r.Session {
		cs.noSession(to)
		cs.share(to)
		return nil, nil
	}
	conn, ok := r.Conn.(session.Conn)
	if !ok {
		_ = r.Close()
		cs.share(to)
		return nil, fmt.Errorf("%T is no connection for a session", r.Conn)
	}
	s, err := session.Dial(conn, session.Options{MaxStreams: maxShared, Timeout: cs.timeout, Log: cs.log})
	if err != nil {
		cs.share(to)
		return nil, err
	}
	c := &carrier{Session: s, used: time.Now()}
	cs.keep(to, c)
	return c, nil
}

// keep puts a session into the pool of its peer until it ends. Where the peer has
// left, or this side is stopping, the session ends with its streams.
func (cs *carriers) keep(to catalog.Key, c *carrier) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	p := cs.pools[to]
	if p == nil {
		p = &pool{}
		c.useless = true
	}
	p.plain = false
	p.backoff = minBackoff
	p.all = append(p.all, c)
	cs.m.sessions(out).Inc()
	cs.wg.Go(func() {
		c.Wait()
		cs.m.sessions(out).Dec()
		cs.mu.Lock()
		defer cs.mu.Unlock()
		p.all = slices.DeleteFunc(p.all, func(other *carrier) bool { return other == c })
	})
	if cs.ctx == nil {
		cs.wg.Go(c.Abort)
	}
}

// share lets those go on that wait for a dial.
func (cs *carriers) share(to catalog.Key) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if p := cs.pools[to]; p != nil && p.dialing != nil {
		close(p.dialing)
		p.dialing = nil
	}
}

// discard puts no more streams on a session. It ends with those that it has.
func (cs *carriers) discard(c *carrier) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.useless = true
}

// free returns the session for the next stream, nil if there is none.
func (p *pool) free(now time.Time) *carrier {
	for _, c := range p.all {
		if c.free(now) {
			return c
		}
	}
	return nil
}

func (c *carrier) free(now time.Time) bool {
	select {
	case <-c.Done():
		return false
	default:
	}
	return !c.useless && !c.Late() && !c.isDoubtful(now) && !c.Settled(settledAfter, settledBytes) && c.Streams() < maxShared
}

// isDoubtful tells that the answer to a ping takes longer than is usual.
func (c *carrier) isDoubtful(now time.Time) bool {
	return !c.pinged.IsZero() && now.Sub(c.pinged) > doubtAfter && c.Heard().Before(c.pinged)
}

// run looks after the sessions until ctx ends, and ends them then.
func (cs *carriers) run(ctx context.Context) {
	cs.mu.Lock()
	cs.ctx = ctx
	cs.mu.Unlock()
	tick := time.NewTicker(carrierTick)
	defer tick.Stop()
	for now := time.Now(); ctx.Err() == nil; {
		cs.look(ctx, now)
		select {
		case now = <-tick.C:
		case <-ctx.Done():
		}
	}
	cs.mu.Lock()
	cs.ctx = nil
	for _, p := range cs.pools {
		for _, c := range p.all {
			cs.wg.Go(func() { _ = c.Close() })
		}
	}
	cs.mu.Unlock()
	cs.wg.Wait()
}

// look is what is done each second.
func (cs *carriers) look(ctx context.Context, now time.Time) {
	peers := cs.peers()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(peers) <= maxWarm {
		for _, peer := range peers {
			cs.pool(peer).warm = true
		}
	}
	for to, p := range cs.pools {
		spare := false
		for _, c := range p.all {
			spare = cs.tend(c, spare, p.warm, now) || spare
		}
		wanted := (p.warm || now.Sub(p.used) < spareFor) && !spare && !p.plain
		if wanted && p.dialing == nil && len(p.all) < maxSessions && now.After(p.retry) {
			p.retry = now.Add(p.backoff)
			p.backoff = min(2*p.backoff, maxBackoff)
			p.dialing = make(chan struct{})
			cs.wg.Go(func() { cs.warm(ctx, to) })
		}
		if !p.warm && len(p.all) == 0 && p.dialing == nil && now.Sub(p.used) > keptFor {
			delete(cs.pools, to)
		}
	}
}

// tend pings and ends what has to be. It reports whether the session is ready for
// the next stream; a second such one is of no use.
func (cs *carriers) tend(c *carrier, spare, warm bool, now time.Time) bool {
	busy := c.Streams() > 0
	if busy {
		c.used = now
	}
	switch {
	case busy:
	case c.useless, c.Late(), spare, !warm && now.Sub(c.used) > keptFor:
		c.useless = true
		cs.wg.Go(func() { _ = c.Close() })
		return false
	}
	if c.pinged.IsZero() && now.Sub(c.Heard()) > pingAfter {
		c.pinged = now
		cs.wg.Go(func() { cs.ping(c) })
	}
	return c.free(now)
}

// ping asks for a sign of life. Without one the session has ended for the peer too.
func (cs *carriers) ping(c *carrier) {
	if _, err := c.Ping(); err != nil {
		c.Abort()
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.pinged = time.Time{}
}

// warm dials a session for streams to come.
func (cs *carriers) warm(ctx context.Context, to catalog.Key) {
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	r, err := cs.dial(ctx, to, Wanted{First: Untyped, Session: true})
	if err == nil && !r.Session {
		_ = r.Close()
		err = errors.New("peer has no sessions")
	}
	c, err := cs.dialled(to, r, err)
	if answer, ok := errors.AsType[answered](err); ok && answer.Answered() {
		cs.noSession(to) // it is asked again when a stream is dialled
	}
	if err != nil {
		cs.log.Debug("no spare session", zap.Stringer("peer", to), zap.Error(err))
	}
	if c != nil {
		cs.share(to)
	}
}

// An answered error is a refusal of the peer's own, and not of somebody on the way.
type answered interface {
	error
	Answered() bool
}

// noSession notes that a peer speaks something else.
func (cs *carriers) noSession(peer catalog.Key) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if p := cs.pools[peer]; p != nil {
		p.plain = true
	}
}

// forget ends the sessions of a peer that left, each with its last stream.
func (cs *carriers) forget(peer catalog.Key) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	p := cs.pools[peer]
	if p == nil {
		return
	}
	p.plain, p.warm, p.used = true, false, time.Time{}
	for _, c := range p.all {
		c.useless = true
	}
}

// count is how many sessions there are to a peer.
func (cs *carriers) count(peer catalog.Key) int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if p := cs.pools[peer]; p != nil {
		return len(p.all)
	}
	return 0
}
