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
)

const (
	defaultReceiveIdle = 150 * time.Second

	// answerWriteTimeout is the budget of the acceptor's empty frame.
	answerWriteTimeout = 5 * time.Second
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
		idle: o.IdleTimeout, log: o.Log.Named("packet"), m: o.Metrics, sources: make(map[catalog.Key]*source),
	}
}

// Serve answers on c, where that is Culvert's protocol, and gives each packet to deliver until the peer closes
// the connection or is idle for too long, which are no errors. When ctx ends Serve tells the peer to stop, takes
// what is under way for a second at most, and returns nil. It owns c and closes it.
//
// Deliver must not keep the payload. Its error drops the packet: one that wraps a [Reason] is counted as that,
// any other as [ReasonDeliverError]; neither ends the connection. From must be the verified identity of the
// peer; nothing is kept for one all of whose packets are dropped as [ReasonUnknownPeer] or [ReasonNoNode].
func (r *Receiver) Serve(ctx context.Context, c Conn, from catalog.Key, deliver func(payload []byte) error) error {
	in := &inbound{Conn: c, idle: r.idle}
	stop := onDone(ctx, in.drain)
	defer stop() // after the connection is closed: a drain that waits for the peer ends with it
	err := r.serve(in, from, deliver)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.Abort()
		return err
	}
	_ = c.Close() // the end is decided; an error of telling the peer changes nothing
	return nil
}

func (r *Receiver) serve(in *inbound, from catalog.Key, deliver func([]byte) error) error {
	if in.Coalesce() {
		_ = in.SetWriteDeadline(time.Now().Add(answerWriteTimeout)) // a closed connection shows in the write
		if _, err := in.Write(AppendFrame(nil, nil)); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
	frames := NewReader(in)
	var src *source
	var skipped uint64
	for {
		p, err := frames.Next()
		if n := frames.Skipped(); n != skipped {
			r.drop(src, ReasonOversize, n-skipped)
			skipped = n
		}
		if err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		if len(p) == 0 {
			continue
		}
		src = r.deliver(src, from, p, deliver)
	}
}

// deliver hands on one packet and counts it.
func (r *Receiver) deliver(src *source, from catalog.Key, p []byte, deliver func([]byte) error) *source {
	err := deliver(p)
	if err == nil {
		src = r.source(src, from)
		src.packets.Add(1)
		src.bytes.Add(uint64(len(p)))
		src.in.add(1, uint64(len(p)))
		return src
	}
	var reason Reason
	if !errors.As(err, &reason) {
		reason = ReasonDeliverError
		r.log.Debug("packet not delivered", zap.Stringer("peer", from), zap.Error(err))
	}
	if reason == ReasonUnknownPeer || reason == ReasonNoNode {
		r.drop(nil, reason, 1)
		return nil
	}
	src = r.source(src, from)
	r.drop(src, reason, 1)
	return src
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

// inbound is a connection under its read deadline: the idle limit, renewed by what arrives, until it is drained.
type inbound struct {
	Conn
	idle time.Duration

	mu       sync.Mutex
	draining bool
}

// Read implements io.Reader.
func (in *inbound) Read(p []byte) (int, error) {
	in.mu.Lock()
	if !in.draining {
		_ = in.SetReadDeadline(time.Now().Add(in.idle)) // a closed connection shows in the read
	}
	in.mu.Unlock()
	return in.Conn.Read(p)
}

// drain tells the peer that nothing more is taken, so that it turns elsewhere, and leaves it a moment for what it
// has under way: a graceful stop costs no packet.
func (in *inbound) drain() {
	in.mu.Lock()
	in.draining = true
	_ = in.SetReadDeadline(time.Now().Add(lingerTimeout))
	in.mu.Unlock()
	_ = in.CloseWrite() // where it fails there is nobody to tell
}
