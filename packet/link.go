package packet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pause"
)

const (
	defaultQueueFrames  = 512
	defaultMaxAge       = 2 * time.Second
	defaultDialTimeout  = 10 * time.Second
	defaultWriteTimeout = 5 * time.Second
	// defaultIdleTimeout ends before any receiver does: Culvert's at 150 s, Consul's at 120 s. A sender that
	// waits longer writes into a connection which is closed already.
	defaultIdleTimeout = 90 * time.Second

	// answerTimeout is how long an acceptor of Culvert's protocol has for its empty frame after the handshake.
	answerTimeout = 5 * time.Second
	// warmFor is how long after a packet a broken connection is dialled again without waiting for the next one.
	warmFor = 10 * time.Second
	// stableAfter is how long a connection must have been up for its end to be followed by a dial at once. One to
	// a native peer, which never answers, must last so long to be up: a refusal takes a round trip.
	stableAfter = time.Second

	shortestBackoff = 50 * time.Millisecond
	longestBackoff  = time.Second
)

// Link states, as in [LinkStatus].
const (
	stateIdle    = "idle"    // no connection, and none is wanted
	stateDialing = "dialing" // a first dial, or the peer has not answered yet; a native one in its first second
	stateUp      = "up"      // the peer has answered, or is native and has kept the connection for a second
	stateDown    = "down"    // the last attempt failed; it is tried again while there is something to send
)

var (
	errIdle     = errors.New("idle limit reached")
	errKicked   = errors.New("connection dropped: its path is known to be dead")
	errNoAnswer = fmt.Errorf("no answer in %v", answerTimeout)
	errUnasked  = errors.New("peer sent what this version did not ask for")
)

// LinkOptions are the settings of a [Link]. Zero durations and counts take the default named.
type LinkOptions struct {
	Peer    catalog.Key // the peer, for metrics and logs
	Service string      // for logs

	QueueFrames  int           // packets that wait at most; 512
	MaxAge       time.Duration // a packet that waited longer is not written; 2 s
	DialTimeout  time.Duration // budget of one call of dial, handshake included; 10 s
	WriteTimeout time.Duration // budget of one write; 5 s
	IdleTimeout  time.Duration // the connection is closed when nothing was sent for so long; 90 s

	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

func (o LinkOptions) withDefaults() LinkOptions {
	if o.QueueFrames <= 0 {
		o.QueueFrames = defaultQueueFrames
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{
		{&o.MaxAge, defaultMaxAge},
		{&o.DialTimeout, defaultDialTimeout},
		{&o.WriteTimeout, defaultWriteTimeout},
		{&o.IdleTimeout, defaultIdleTimeout},
	} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	return o
}

// LinkStatus is a [Link] at one moment.
type LinkStatus struct {
	State       string            // up, dialing, idle or down; a native peer is up after a second
	PacketsSent uint64            // written to connections that were up, counted when they are
	BytesSent   uint64            // payload bytes of these
	Drops       map[string]uint64 // by [Reason]; those that occurred
	QueueLen    int               // packets that wait
	LastError   string            // why a connection or a dial last failed, kept after recovery; "" never
	Since       time.Time         // when State began
}

// Link sends the packets of one service to one peer over one connection at a time, which it dials when there is
// something to send. What cannot be sent is dropped, oldest first, and counted: [Link.Send] never waits, so one
// stuck peer delays no other.
type Link struct {
	dial func(context.Context) (Conn, error)
	o    LinkOptions
	log  *zap.Logger
	out  series
	wake chan struct{} // holds a token when the queue may have grown

	mu        sync.Mutex
	queue     queue
	stopped   bool
	lastSend  time.Time
	state     string
	since     time.Time
	lastError string
	packets   uint64
	bytes     uint64
	drops     map[Reason]uint64
	cancel    context.CancelCauseFunc // of the dial or connection in progress, else nil
}

// NewLink returns a link whose connections come from dial. Dial is called by one goroutine at a time, does its
// own retrying over the paths there are until its context ends, and returns a connection whose handshake is done
// and which the link then owns. A link that is never run holds nothing but its queue.
func NewLink(dial func(ctx context.Context) (Conn, error), o LinkOptions) *Link {
	o = o.withDefaults()
	return &Link{
		dial:  dial,
		o:     o,
		log:   o.Log.Named("packet").With(zap.Stringer("peer", o.Peer), zap.String("service", o.Service)),
		out:   o.Metrics.series(directionOut, o.Peer),
		wake:  make(chan struct{}, 1),
		queue: queue{max: o.QueueFrames},
		state: stateIdle,
		since: time.Now(),
		drops: make(map[Reason]uint64),
	}
}

// Send queues a copy of one packet. It never blocks: when the queue is full the oldest packet makes room.
// Packets that cannot be carried, empty ones and those over [MaxPayload], are counted as dropped.
func (l *Link) Send(payload []byte) {
	now := time.Now()
	l.mu.Lock()
	switch {
	case l.stopped:
		l.drop(ReasonClosed, 1)
	case len(payload) == 0:
		l.drop(ReasonEmpty, 1)
	case len(payload) > MaxPayload:
		l.drop(ReasonOversize, 1)
	default:
		l.expire(now)
		if l.queue.full() {
			l.queue.recycle(l.queue.pop())
			l.drop(ReasonQueueFull, 1)
		}
		l.queue.push(payload, now)
		l.lastSend = now
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Kick ends the dial or the connection in progress, because the path it takes is known to be dead; the next one
// is dialled as after any other end. Packets that were being written are tried again.
func (l *Link) Kick() {
	l.mu.Lock()
	cancel := l.cancel
	l.mu.Unlock()
	if cancel != nil {
		cancel(errKicked)
	}
}

// Status returns the link's state and counts.
func (l *Link) Status() LinkStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := LinkStatus{
		State: l.state, PacketsSent: l.packets, BytesSent: l.bytes, QueueLen: l.queue.n,
		LastError: l.lastError, Since: l.since, Drops: make(map[string]uint64, len(l.drops)),
	}
	for r, n := range l.drops {
		st.Drops[string(r)] = n
	}
	return st
}

// Run dials and writes until ctx ends, then closes the connection gracefully and returns nil. It is called once.
func (l *Link) Run(ctx context.Context) error {
	defer l.shut()
	delay := shortestBackoff
	for l.await(ctx) {
		if l.attempt(ctx) {
			delay = shortestBackoff
			continue
		}
		if !pause.For(ctx, jitter(delay)) {
			break
		}
		delay = min(2*delay, longestBackoff)
	}
	return nil
}

// await blocks until a connection is wanted: a packet waits, or one was sent so lately that the next is due.
func (l *Link) await(ctx context.Context) bool {
	for ctx.Err() == nil {
		if l.wanted() {
			return true
		}
		select {
		case <-l.wake:
		case <-ctx.Done():
		}
	}
	return false
}

func (l *Link) wanted() bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	if l.queue.n > 0 || now.Sub(l.lastSend) < min(warmFor, l.o.IdleTimeout) {
		return true
	}
	l.queue.trim()
	return false
}

// attempt dials once and serves the connection until it ends. It reports whether that was up for long enough
// to be followed by the next dial without a pause.
func (l *Link) attempt(ctx context.Context) bool {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.begin(cancel)
	c, err := l.dialOnce(ctx)
	if err != nil {
		l.end(stateDown, fmt.Errorf("dial: %w", err))
		return false
	}
	s := newSession(l, c)
	err = s.run(ctx)
	if !s.isAnswered() {
		l.end(stateDown, err)
		return false
	}
	l.end(stateIdle, err)
	return time.Since(s.answered) >= stableAfter
}

func (l *Link) dialOnce(ctx context.Context) (Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.DialTimeout)
	defer cancel()
	return l.dial(ctx)
}

func (l *Link) begin(cancel context.CancelCauseFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel = cancel
	if l.state != stateDown { // down stays down until the next is up
		l.setState(stateDialing)
	}
}

// end notes how an attempt ended: err nil is a clean end. The first failure in a row is worth a line.
func (l *Link) end(state string, err error) {
	l.mu.Lock()
	first := l.state != stateDown
	l.cancel = nil
	l.setState(state)
	if err != nil {
		l.lastError = err.Error()
	}
	l.mu.Unlock()
	switch {
	case err == nil:
		l.log.Debug("link closed")
	case first:
		l.log.Warn("link lost", zap.Error(err))
	default:
		l.log.Debug("link still down", zap.Error(err))
	}
}

func (l *Link) shut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.drop(ReasonClosed, uint64(l.queue.n)) //nolint:gosec // a count of frames, never negative
	l.queue = queue{max: l.o.QueueFrames}
	l.setState(stateDown)
}

// take fills flight with the frames of one write: one, or with coalesce as many as one TLS record holds.
func (l *Link) take(flight []frame, coalesce bool) []frame {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	size := 0
	for f := l.queue.oldest(); f != nil; f = l.queue.oldest() {
		size += len(f.buf)
		if len(flight) > 0 && (!coalesce || size > maxRecord) {
			break
		}
		flight = append(flight, l.queue.pop())
	}
	return flight
}

// untake puts the frames of a write back in front, where they are not too old. If the write was tried, each frame
// comes back once in its life: memberlist drops the double of a packet, and a part of a frame is discarded with
// its connection.
func (l *Link) untake(flight []frame, tried bool) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range slices.Backward(flight) {
		switch {
		case f.retried && tried:
			l.drop(ReasonWriteError, 1)
		case now.Sub(f.at) > l.o.MaxAge:
			l.drop(ReasonExpired, 1)
		default:
			f.retried = f.retried || tried
			if l.queue.unpop(f) {
				continue
			}
			l.drop(ReasonQueueFull, 1)
		}
		l.queue.recycle(f)
	}
}

// expire drops the frames that are over the age limit. The lock is held by the caller, as in what follows.
func (l *Link) expire(now time.Time) {
	for f := l.queue.oldest(); f != nil && now.Sub(f.at) > l.o.MaxAge; f = l.queue.oldest() {
		l.queue.recycle(l.queue.pop())
		l.drop(ReasonExpired, 1)
	}
}

func (l *Link) drop(r Reason, n uint64) {
	if n == 0 {
		return
	}
	l.drops[r] += n
	l.o.Metrics.dropped(directionOut, r, n)
}

func (l *Link) sent(packets, bytes uint64) {
	l.packets += packets
	l.bytes += bytes
	l.out.add(packets, bytes)
}

func (l *Link) setState(state string) {
	if l.state != state {
		l.state, l.since = state, time.Now()
	}
}

// jitter spreads the redials of many links over the second half of d.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2) //nolint:gosec // spreads load, guards nothing
}
