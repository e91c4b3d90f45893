package packet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/free"
)

const (
	defaultReceiveIdle = 150 * time.Second

	// maxBatch is how many packets are delivered at once at most.
	maxBatch = 64
	// idleGrain is the part of the idle limit that a connection may be closed early by: to set a deadline for each
	// packet would cost more than to read it.
	idleGrain = 50
	// lingerTimeout is how long a stopping receiver still takes what its peer had under way.
	lingerTimeout = time.Second
)

// ReceiverOptions are the settings of a [Receiver].
type ReceiverOptions struct {
	// IdleTimeout closes a connection on which nothing arrived for so long; 0 means 150 s. It must be longer
	// than any sender's (90 s here), which otherwise writes into a closed connection.
	IdleTimeout time.Duration

	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

func newBuffers() buffers { return new(free.List[[readBuffer]byte]) }

// Received is what came from one peer, over all of its connections and services.
type Received struct {
	Packets uint64            // delivered
	Bytes   uint64            // payload bytes of these
	Drops   map[string]uint64 // by [Reason]; those that occurred
}

// Receiver is the acceptor's side of packet connections. A peer may have any number of them at a time.
type Receiver struct {
	idle time.Duration
	log  *zap.Logger
	m    *Metrics

	buffers buffers

	mu      sync.Mutex
	sources map[catalog.Key]*source
}

// source counts what one peer sent.
type source struct {
	in             series
	packets, bytes atomic.Uint64
	forgotten      atomic.Bool

	mu    sync.Mutex
	drops map[Reason]uint64
}

// NewReceiver returns a receiver without connections.
func NewReceiver(o ReceiverOptions) *Receiver {
	if o.IdleTimeout <= 0 {
		o.IdleTimeout = defaultReceiveIdle
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	return &Receiver{
		idle: o.IdleTimeout, log: o.Log.Named("packet"), m: o.Metrics, buffers: newBuffers(), sources: make(map[catalog.Key]*source),
	}
}

// Serve answers on c, where that is Culvert's protocol, and gives the packets to deliver until the peer closes
// the connection or is idle for too long, which are no errors. When ctx ends Serve tells the peer to stop, takes
// what is under way for a second at most, and returns nil. It owns c and closes it.
//
// If the peer offers so, what link has to send goes out on c; nil: there is no link to the peer.
//
// From must be the verified identity of the peer; nothing is kept for one all of whose packets are dropped as [ReasonUnknownPeer] or [ReasonNoNode].
func (r *Receiver) Serve(ctx context.Context, c Conn, from catalog.Key, link *Link, deliver Deliver) error {
	in := &inbound{Conn: c, idle: r.idle, link: link, feed: feed{r: r, from: from, deliver: deliver}}
	stop := onDone(ctx, in.drain)
	defer stop() // after the connection is closed: a drain that waits for the peer ends with it
	err := in.serve()
	if in.session != nil {
		in.session.end(err)
		return nil // the link tells it
	}
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.Abort()
		return err
	}
	_ = c.Close() // the end is decided; an error of telling the peer changes nothing
	return nil
}

// Deliver hands packets to the local server, in their order. It returns how many of them it has handed on and, if not
// all, why not the next one; it is called again for those behind that. It must not keep them. A reason that is or wraps
// a [Reason] is counted as that, any other as [ReasonDeliverError]; neither ends the connection.
type Deliver func(packets [][]byte) (n int, err error)

// feed is what one connection brings: it hands that to the local server, and counts.
type feed struct {
	r       *Receiver
	from    catalog.Key
	deliver Deliver
	src     *source  // nil: not known yet
	large   uint64   // frames skipped, counted
	batch   [][]byte // of take
}

// skipped counts the frames that a reader has skipped since the last time.
func (f *feed) skipped(by *Reader) {
	if n := by.Skipped(); n != f.large {
		f.r.drop(f.src, ReasonOversize, n-f.large)
		f.large = n
	}
}

// take hands on a packet, and those which are at hand behind it.
func (f *feed) take(p []byte, frames *Reader) error {
	batch := append(f.batch[:0], p)
	var err error
	for len(batch) < maxBatch && err == nil && frames.Ready() {
		if p, err = frames.Next(); len(p) > 0 {
			batch = append(batch, p)
		}
	}
	f.batch = batch[:0]
	for len(batch) > 0 {
		n, err := f.deliver(batch)
		f.delivered(batch[:n])
		if err == nil {
			break
		}
		f.lost(err)
		batch = batch[n+1:]
	}
	f.skipped(frames)
	return err
}

func (f *feed) delivered(batch [][]byte) {
	if len(batch) == 0 {
		return
	}
	var bytes uint64
	for _, p := range batch {
		bytes += uint64(len(p))
	}
	f.src = f.r.source(f.src, f.from)
	f.src.packets.Add(uint64(len(batch)))
	f.src.bytes.Add(bytes)
	f.src.in.add(uint64(len(batch)), bytes)
}

func (f *feed) lost(err error) {
	var reason Reason
	if !errors.As(err, &reason) {
		reason = ReasonDeliverError
		f.r.log.Debug("packet not delivered", zap.Stringer("peer", f.from), zap.Error(err))
	}
	if reason == ReasonUnknownPeer || reason == ReasonNoNode {
		f.r.drop(nil, reason, 1)
		f.src = nil
		return
	}
	f.src = f.r.source(f.src, f.from)
	f.r.drop(f.src, reason, 1)
}

// drop counts n packets, for the peer too unless src is nil.
func (r *Receiver) drop(src *source, reason Reason, n uint64) {
	r.m.dropped(directionIn, reason, n)
	if src == nil {
		return
	}
	src.mu.Lock()
	defer src.mu.Unlock()
	src.drops[reason] += n
}

// source returns the counts of a peer: src, unless it is nil or was forgotten meanwhile.
func (r *Receiver) source(src *source, key catalog.Key) *source {
	if src != nil && !src.forgotten.Load() {
		return src
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	src = r.sources[key]
	if src == nil {
		src = &source{in: r.m.series(directionIn, key), drops: make(map[Reason]uint64)}
		r.sources[key] = src
	}
	return src
}

// Received returns the counts of a peer; zero if nothing came from it.
func (r *Receiver) Received(from catalog.Key) Received {
	r.mu.Lock()
	src := r.sources[from]
	r.mu.Unlock()
	if src == nil {
		return Received{Drops: map[string]uint64{}}
	}
	src.mu.Lock()
	defer src.mu.Unlock()
	got := Received{Packets: src.packets.Load(), Bytes: src.bytes.Load(), Drops: make(map[string]uint64, len(src.drops))}
	for reason, n := range src.drops {
		got.Drops[string(reason)] = n
	}
	return got
}

// Forget drops the counts of a peer that left the catalog; call it before [Metrics.Forget]. Deliver must refuse
// the peer's packets by then, or they make it known again.
func (r *Receiver) Forget(key catalog.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if src := r.sources[key]; src != nil {
		src.forgotten.Store(true)
		delete(r.sources, key)
	}
}

// inbound is a connection that the peer has dialled. One-way, it is under its read deadline: the idle limit, renewed
// by what arrives, until it is drained. Two-way, it is a session of the link, under the link's pulse.
type inbound struct {
	Conn
	idle    time.Duration
	link    *Link
	feed    feed
	renewed time.Time // when the read deadline was last set

	mu       sync.Mutex
	draining bool
	session  *session // set by the reader; nil: one way
}

func (in *inbound) serve() error {
	if err := in.answer(); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	frames := newReader(in, in.feed.r.buffers)
	for first := true; ; first = false {
		p, err := frames.Next()
		in.feed.skipped(frames)
		if err == nil && len(p) > 0 {
			err = in.feed.take(p, frames)
		}
		if err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		if len(p) == 0 && first && in.Coalesce() && in.link != nil {
			in.adopt()
		}
	}
}

// answer tells the peer that it is accepted, unless it has been told already that nothing is taken.
func (in *inbound) answer() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.Coalesce() || in.draining {
		return nil
	}
	_, err := in.Write(AppendFrame(nil, nil)) // which does not wait
	return err
}

// adopt takes the peer's offer.
func (in *inbound) adopt() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.draining {
		return
	}
	_ = in.SetReadDeadline(time.Time{}) // a closed connection shows in the read; before a link may set its own
	in.session = in.link.adopt(in.Conn)
	in.renewed = time.Time{}
}

// Read implements io.Reader.
func (in *inbound) Read(p []byte) (int, error) {
	if in.session != nil {
		return in.session.Read(p)
	}
	in.mu.Lock()
	if now := time.Now(); !in.draining && now.Sub(in.renewed) > in.idle/idleGrain {
		in.renewed = now
		_ = in.SetReadDeadline(now.Add(in.idle))
	}
	in.mu.Unlock()
	return in.Conn.Read(p)
}

// drain tells the peer that nothing more is taken, so that it turns elsewhere, and leaves it a moment for what it
// has under way: a graceful stop costs no packet.
func (in *inbound) drain() {
	in.mu.Lock()
	in.draining = true
	session := in.session
	if session == nil {
		_ = in.SetReadDeadline(time.Now().Add(lingerTimeout))
	}
	in.mu.Unlock()
	if session != nil {
		session.drain()
		return
	}
	_ = in.CloseWrite() // where it fails there is nobody to tell
}
