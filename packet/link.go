package packet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
)

const (
	defaultQueueFrames  = 512
	defaultMaxAge       = 2 * time.Second
	defaultDialTimeout  = 10 * time.Second
	defaultWriteTimeout = 5 * time.Second
	// defaultIdleTimeout ends before any receiver does: Culvert's at 150 s, Consul's at 120 s. A sender that
	// waits longer writes into a connection which is closed already.
	defaultIdleTimeout = 90 * time.Second
	defaultSpread      = time.Second

	// answerTimeout is how long an acceptor of Culvert's protocol has for its empty frame after the handshake.
	answerTimeout = 5 * time.Second
	// stableAfter is how long a connection must have been up for its end to be followed by a dial at once. One to
	// a native peer, which never answers, must last so long to be up: a refusal takes a round trip.
	stableAfter = time.Second
)

// Link states, as in [LinkStatus].
const (
	stateIdle    = "idle"    // no connection, and none is wanted
	stateDialing = "dialing" // a first dial, or the peer has not answered yet; a native one in its first second
	stateUp      = "up"      // the peer has answered or dialled, or is native and has kept the connection for a second
	stateDown    = "down"    // the last attempt failed; it is tried again
)

var (
	errIdle     = errors.New("idle limit reached")
	errStopped  = errors.New("link stopped")
	errKicked   = errors.New("connection dropped: its path is known to be dead")
	errDead     = fmt.Errorf("nothing has arrived for %v", deadAfter)
	errNoAnswer = fmt.Errorf("no answer in %v", answerTimeout)
	errUnasked  = errors.New("peer sent what this version did not ask for")
)

// LinkOptions are the settings of a [Link]. Zero durations and counts take the default named.
type LinkOptions struct {
	Self    catalog.Key // this side: the lower of the two keeps its own where both have dialled
	Peer    catalog.Key // the peer, for metrics and logs
	Service string      // for logs

	// Deliver is handed what the peer sends on connections that the link has dialled, and Receiver counts that. With it the link offers its peer to send both ways on each connection, and is connected
	// all the time to a peer that does. Nil: packets go from the dialler to the acceptor, and the link is connected
	// while there is something to send.
	Deliver  Deliver
	Receiver *Receiver // nil: of its own
	// Pulse beats for the link's connections; nil: they are neither kept alive nor found dead or idle.
	Pulse *Pulse

	QueueFrames  int           // packets that wait at most; 512
	MaxAge       time.Duration // a packet that waited longer is not written; 2 s
	DialTimeout  time.Duration // budget of one call of dial, handshake included; 10 s
	WriteTimeout time.Duration // how long one write may wait for the peer to make room; 5 s
	IdleTimeout  time.Duration // a one-way connection is closed when nothing was sent for so long; 90 s
	Spread       time.Duration // the first dial without a packet comes within so long after the start, the higher side's within twice that; 1 s

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
		{&o.Spread, defaultSpread},
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
	if o.Receiver == nil {
		o.Receiver = NewReceiver(ReceiverOptions{Metrics: o.Metrics})
	}
	if o.Pulse == nil {
		o.Pulse = NewPulse()
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

// Link carries the packets of one service to one peer, and those that come back on the same connection. It dials
// where the peer has not, see [LinkOptions]. What cannot be sent is dropped, oldest first, and counted: [Link.Send]
// never waits, so one stuck peer delays no other.
type Link struct {
	dial func(context.Context) (Conn, error)
	o    LinkOptions
	log  *zap.Logger
	out  series
	wg   sync.WaitGroup // dials, and the readers of dialled connections

	mu        sync.Mutex
	queue     queue
	lastSend  time.Time
	state     string
	since     time.Time
	lastError string
	packets   uint64
	bytes     uint64
	drops     map[Reason]uint64

	ctx      context.Context // of dials; nil: not started
	stopped  bool
	sessions []*session // the connections that packets may go out on, the newest last
	to       *session   // the one that they do go out on; nil: there is none
	ending   int        // connections that have left and are not closed
	retired  []*session // connections that are read to their end
	told     bool       // why the link is not up
	redials
}

// NewLink returns a link whose connections come from dial. Dial is called by one goroutine at a time, does its
// own retrying over the paths there are until its context ends, and returns a connection whose handshake is done
// and which the link then owns. A link that is never started holds nothing but its queue.
func NewLink(dial func(ctx context.Context) (Conn, error), o LinkOptions) *Link {
	o = o.withDefaults()
	l := &Link{
		dial:  dial,
		o:     o,
		log:   o.Log,
		out:   o.Metrics.series(directionOut, o.Peer),
		queue: queue{max: o.QueueFrames},
		state: stateIdle,
		since: time.Now(),
		drops: make(map[Reason]uint64),
	}
	l.reset(l.isLower())
	return l
}

// isLower tells which of the two sides keeps what it has dialled.
func (l *Link) isLower() bool { return l.o.Self.Compare(l.o.Peer) < 0 }

// Start begins to connect and to send, until [Link.Stop]. It is called once. The end of ctx alone ends dials, and
// no connection.
func (l *Link) Start(ctx context.Context) {
	l.o.Pulse.add(l)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ctx = ctx
	if l.isWarm() {
		wait := spread(l.o.Spread)
		if !l.isLower() {
			wait += l.o.Spread // so that most connections are dialled once
		}
		l.arm(wait)
	}
	l.flush()
}

// Stop closes the connections gracefully: what the peer had sent already is delivered, for a second at most. It
// returns when all is over but those that the peer has dialled; they are their [Receiver.Serve]'s.
func (l *Link) Stop() {
	l.o.Pulse.remove(l)
	l.mu.Lock()
	l.stopped = true
	l.disarm()
	if l.cancel != nil {
		l.cancel(errStopped)
	}
	for _, s := range l.retired {
		_ = s.c.SetReadDeadline(time.Now().Add(lingerTimeout)) // no later than it is, where it is one of a stop
	}
	for _, s := range slices.Clone(l.sessions) {
		s.stop()
	}
	l.mu.Unlock()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop(ReasonClosed, uint64(l.queue.n)) //nolint:gosec // a count of frames, never negative
	l.queue = queue{max: l.o.QueueFrames}
	l.setState(stateDown)
}

// Send queues a copy of one packet, and writes what waits as far as that is possible at once. It never blocks: when
// the queue is full the oldest packet makes room. With more, another packet for this link follows at once, and
// nothing is written before it. Packets that cannot be carried, empty ones and those over [MaxPayload], are counted
// as dropped.
func (l *Link) Send(payload []byte, more bool) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
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
	if !more {
		l.flush()
	}
}

// flush writes what waits to the connection in use, unless somebody is at it already, or sees to it that there will be
// a connection. The lock is held by the caller, as in all that follows, and let go while something is written.
func (l *Link) flush() {
	for s := l.to; s != nil && !s.writing && s.fill(); s = l.to {
		s.put()
	}
	if l.to == nil && l.queue.n > 0 {
		l.hurry()
	}
}

// enter makes a connection one that packets may go out on.
func (l *Link) enter(s *session) {
	l.sessions = append(l.sessions, s)
	l.choose()
}

// leave takes a connection out of those that packets may go out on, as it has ended or will presently. Until then no
// other is dialled, so that what it has to say is heard first.
func (l *Link) leave(s *session) {
	if slices.Contains(l.sessions, s) {
		s.ending = true
		l.ending++
		l.sessions = without(l.sessions, s)
		l.choose()
	}
}

// choose takes the newest of the connections that are up: where the peer has dialled although there was one, that one
// may be over for it. What is not up yet is used where there is nothing else.
func (l *Link) choose() {
	l.to = nil
	for _, s := range slices.Backward(l.sessions) {
		if s.isUp() {
			l.to = s
			return
		}
		if l.to == nil {
			l.to = s
		}
	}
}

// adopt makes a connection that the peer has dialled, and offered, one of the link's. Connections that the peer has
// dialled before are over for it; one that this side has dialled is, if the peer is the lower one: it has seen by then
// that both have dialled, and the other side will, as it reads the end of the connection. Adopt returns nil for a link
// that does not run.
func (l *Link) adopt(c Conn) *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped || l.ctx == nil || l.o.Deliver == nil {
		return nil
	}
	s := newSession(l, c)
	s.answered, s.twoWay, s.blank = s.began, true, true
	l.plain = false
	for _, old := range slices.Clone(l.sessions) {
		if !old.dialled || !l.isLower() {
			old.retire(retireTimeout)
		}
	}
	l.disarm()
	l.enter(s)
	l.up(s)
	l.flush()
	return s
}

// beat is called once a second by the pulse.
func (l *Link) beat(now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range slices.Backward(l.sessions) { // from behind, as one that ends leaves the list
		s.beat(now)
	}
	l.flush()
	for { // kept alive are those too on which nothing else goes out
		i := slices.IndexFunc(l.sessions, func(s *session) bool { return s.blank && !s.writing })
		if i < 0 {
			return
		}
		s := l.sessions[i]
		s.flight = s.flight[:0]
		s.put()
	}
}

// Kick ends the dial or the connection in progress, because the path it takes is known to be dead; the next one
// is dialled as after any other end. Packets that were being written are tried again.
func (l *Link) Kick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancel != nil {
		l.cancel(errKicked)
	}
	if l.to != nil {
		l.to.kill(errKicked)
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

// up notes that a connection is.
func (l *Link) up(s *session) {
	l.setState(stateUp)
	l.told = false
	l.logger().Info("link up", zap.Stringer("remote", s.c.RemoteAddr()), zap.Bool("dialled", s.dialled))
}

// logger is made for each line: one for each link would cost several KiB.
func (l *Link) logger() *zap.Logger {
	return l.log.Named("packet").With(zap.Stringer("peer", l.o.Peer), zap.String("service", l.o.Service))
}

// failed notes how a connection or a dial ended: err nil is a clean end. The first failure in a row is worth a line,
// if the link was up or somebody waits.
func (l *Link) failed(state string, err error) {
	first := !l.told && (l.state == stateUp || l.isUsed(time.Now()))
	l.setState(state)
	if err != nil {
		l.lastError = err.Error()
	}
	switch {
	case err == nil:
		l.logger().Debug("link closed")
	case first:
		l.told = true
		l.logger().Warn("link lost", zap.Error(err))
	default:
		l.logger().Debug("link still down", zap.Error(err))
	}
}

// take fills flight with the frames of one write: one, or with coalesce as many as fit in size bytes.
func (l *Link) take(flight []frame, coalesce bool, size int) []frame {
	l.expire(time.Now())
	for f := l.queue.oldest(); f != nil; f = l.queue.oldest() {
		size -= len(f.buf)
		if len(flight) > 0 && (!coalesce || size < 0) {
			break
		}
		flight = append(flight, l.queue.pop())
	}
	return flight
}

// untake puts the frames of a write that failed back in front, where they are not too old. Each frame comes back once
// in its life: memberlist drops the double of a packet, and a part of a frame is discarded with its connection.
func (l *Link) untake(flight []frame) {
	now := time.Now()
	for _, f := range slices.Backward(flight) {
		switch {
		case f.retried:
			l.drop(ReasonWriteError, 1)
		case now.Sub(f.at) > l.o.MaxAge:
			l.drop(ReasonExpired, 1)
		default:
			f.retried = true
			if l.queue.unpop(f) {
				continue
			}
			l.drop(ReasonQueueFull, 1)
		}
		l.queue.recycle(f)
	}
}

// expire drops the frames that are over the age limit.
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
