// Package stream relays TCP connections between the local server and its
// peers: [Outbound] takes what the server dialled, [Inbound] what a peer sent.
//
//	out := stream.NewOutbound(dialPeer, stream.OutboundOptions{Metrics: m})
//	out.Stream(ctx, bob, "rpc", captured) // returns when the connection has ended
//
//	in := stream.NewInbound(dialServer, stream.InboundOptions{Metrics: m})
//	in.ServeConn(ctx, bob, "rpc", stream.Untyped, accepted)
//
// A service may have types: the first byte of a connection tells what it is, as
// on Consul's RPC port. A peer's sidecar gets the connection as it is. A native
// server is told the type before, by another protocol, and gets what follows the
// byte; from one the byte is put back.
//
// Ends are passed on as what they are, half-closes and resets. A connection
// that cannot be made is refused: the side that asked sees a reset at once, as
// it would from the server itself.
//
// What is established has no idle limit and no lifetime: RPC connections are
// silent for hours. TCP keepalive and TCP_USER_TIMEOUT find the dead.
//
// Both types are for any number of goroutines. They own the connections that
// they are given and leave none behind when their methods return.
package stream

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/internal/sample"
	"culvert/internal/sockopt"
)

// PeerStats are the streams of one peer in one direction of dialling.
type PeerStats struct {
	Open          int    // now
	Total         uint64 // established since the start
	BytesSent     uint64 // local server to peer
	BytesReceived uint64 // peer to local server
	LastError     string // why one last failed to be established; "" never
}

// peerStats is PeerStats while it is counted.
type peerStats struct {
	open                  atomic.Int64
	total, sent, received atomic.Uint64
	lastError             atomic.Pointer[string]
}

// relays is what both directions share.
type relays struct {
	dir  direction
	log  *zap.Logger
	m    *Metrics
	warn sample.Sampler

	mu    sync.Mutex
	peers map[catalog.Key]*peerStats
}

func newRelays(dir direction, log *zap.Logger, m *Metrics) *relays {
	if log == nil {
		log = zap.NewNop()
	}
	if m == nil {
		m = NewMetrics(nil)
	}
	return &relays{dir: dir, log: log.Named("stream"), m: m, peers: make(map[catalog.Key]*peerStats)}
}

func (r *relays) stats(peer catalog.Key) *peerStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.peers[peer]
	if p == nil {
		p = &peerStats{}
		r.peers[peer] = p
	}
	return p
}

// Peer returns the counts of a peer; zero if there was no stream.
func (r *relays) Peer(peer catalog.Key) PeerStats {
	r.mu.Lock()
	p := r.peers[peer]
	r.mu.Unlock()
	if p == nil {
		return PeerStats{}
	}
	s := PeerStats{
		Open: int(p.open.Load()), Total: p.total.Load(), BytesSent: p.sent.Load(), BytesReceived: p.received.Load(),
	}
	if e := p.lastError.Load(); e != nil {
		s.LastError = *e
	}
	return s
}

// Forget drops the counts of a peer that left.
func (r *relays) Forget(peer catalog.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.peers, peer)
}

// join relays until both sides have ended, or ctx has. It owns both.
func (r *relays) join(ctx context.Context, peer catalog.Key, service string, server, far net.Conn) {
	stats, series := r.stats(peer), r.m.series(r.dir, service)
	if tcp, ok := server.(*net.TCPConn); ok && r.dir == out { // who was dialled has its options
		if err := sockopt.Stream(tcp); err != nil {
			r.log.Debug("tune connection", zap.Stringer("peer", peer), zap.Error(err)) // it is closed already, most likely
		}
	}
	stats.open.Add(1)
	stats.total.Add(1)
	series.connections.Inc()
	series.open.Inc()
	defer func() {
		stats.open.Add(-1)
		series.open.Dec()
	}()
	abort := context.AfterFunc(ctx, func() {
		pipe.Abort(server)
		pipe.Abort(far)
	})
	defer abort()
	res := pipe.Join(server, far, pipe.Options{
		AtoB: both{&stats.sent, r.m.bytes(out, service)},
		BtoA: both{&stats.received, r.m.bytes(in, service)},
	})
	if why := refusal(res); why != nil && r.dir == out {
		r.failed(peer, service, "peer refused", why)
		return
	}
	r.log.Debug("stream ended", zap.Stringer("peer", peer), zap.String("service", service),
		zap.Int64("sent", res.AtoB), zap.Int64("received", res.BtoA), zap.Bool("reset", res.Reset), zap.Error(res.Err))
}

// received counts bytes that were handed to the local server before a join.
func (r *relays) received(peer catalog.Key, service string, n int) {
	r.stats(peer).received.Add(uint64(n)) //nolint:gosec // not negative
	r.m.bytes(in, service).Add(float64(n))
}

// A refused error is one by which the far side tells that it does not take the
// connection: a TLS alert.
type refused interface {
	error
	Refused() bool
}

// refusal returns the reason for which a peer sent nothing else, or nil. In TLS
// 1.3 a dialler that is refused has its connection by then: the far side looks
// at the certificate after the dialler's handshake is done.
func refusal(res pipe.Result) error {
	var why refused
	if res.BtoA == 0 && errors.As(res.Err, &why) && why.Refused() {
		return why
	}
	return nil
}

// failed notes a stream that could not be established.
func (r *relays) failed(peer catalog.Key, service string, what string, err error) {
	text := err.Error()
	r.stats(peer).lastError.Store(&text)
	r.m.failed(r.dir)
	suppressed, ok := r.warn.Allow(peer.String() + " " + service)
	if !ok {
		return
	}
	r.log.Warn(what, zap.Stringer("peer", peer), zap.String("service", service), zap.Int("suppressed", suppressed), zap.Error(err))
}

// both counts bytes in a metric and for the status.
type both struct {
	n       *atomic.Uint64
	counter pipe.Counter
}

func (b both) Add(n float64) {
	b.n.Add(uint64(n))
	b.counter.Add(n)
}
