package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/connset"
	"culvert/internal/pipe"
)

// DialTimeout is how long a peer has to be reached, TLS handshake included.
const DialTimeout = 10 * time.Second

// Wanted is what a peer is dialled for.
type Wanted struct {
	Service string
	First   Type // the byte that the connection begins with, [Untyped] of a service without types
	// Session tells that a session is as good, on which the stream is to ride. It
	// is all that is wanted where there is no Service.
	Session bool
}

// Reached is a connection to a peer.
type Reached struct {
	net.Conn      // it should have CloseWrite and Abort methods
	Told     bool // the peer knows the first byte already and wants what comes behind it
	Session  bool // it is one for a session
}

// A DialPeer connects to a peer. The connection is the caller's.
type DialPeer func(ctx context.Context, to catalog.Key, want Wanted) (Reached, error)

// OutboundOptions configure an [Outbound].
type OutboundOptions struct {
	// Typed are the services whose connections begin with a byte that tells
	// what they are.
	Typed []string
	// Refuse tells why a peer is not even to be dialled now; nil goes on. A nil
	// function refuses nobody.
	Refuse func(to catalog.Key) error
	// Alone tells which streams are to have a connection of their own from the
	// start, as they are known to be long. Nil means none.
	Alone func(service string, first Type) bool
	// Peers are those with which a session is kept for streams to come, unless
	// they are too many. Nil means none.
	Peers   func() []catalog.Key
	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

// Outbound carries connections of the local server to its peers.
type Outbound struct {
	*relays
	o        OutboundOptions
	dial     DialPeer
	open     *connset.Set // those of the local server
	carriers *carriers
}

// NewOutbound returns an Outbound that reaches peers with dial.
func NewOutbound(dial DialPeer, o OutboundOptions) *Outbound {
	if o.Refuse == nil {
		o.Refuse = func(catalog.Key) error { return nil }
	}
	if o.Alone == nil {
		o.Alone = func(string, Type) bool { return false }
	}
	if o.Peers == nil {
		o.Peers = func() []catalog.Key { return nil }
	}
	r := newRelays(out, o.Log, o.Metrics)
	return &Outbound{relays: r, o: o, dial: dial, open: connset.New(), carriers: newCarriers(o.Peers, dial, r.log, r.m)}
}

// Run keeps sessions with peers, on which streams ride, until ctx ends. Without it
// each stream gets a connection of its own. It returns nil.
func (o *Outbound) Run(ctx context.Context) error {
	o.carriers.run(ctx)
	return nil
}

// Sessions is how many sessions with a peer there are that this side began.
func (o *Outbound) Sessions(peer catalog.Key) int { return o.carriers.count(peer) }

// Forget drops the counts of a peer that left, and ends its sessions when their
// streams have ended.
func (o *Outbound) Forget(peer catalog.Key) {
	o.carriers.forget(peer)
	o.relays.Forget(peer)
}

// reach connects to a peer for a stream.
func (o *Outbound) reach(ctx context.Context, to catalog.Key, service string, first Type) (Reached, error) {
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	want := Wanted{Service: service, First: first}
	if o.o.Alone(service, first) {
		return o.dial(ctx, to, want)
	}
	return o.carriers.reach(ctx, to, want)
}

// Drain refuses new streams and waits until those that are open have ended. It
// aborts what is left when ctx ends, and returns how many that were.
func (o *Outbound) Drain(ctx context.Context) int { return o.open.Drain(ctx) }

// Stream connects to the peer and relays until both sides have ended or ctx
// has. It owns c. What the server sends meanwhile waits in the kernel, and a
// server that gives up is noticed when the peer has been reached, after
// [DialTimeout] at the latest. A connection that is to begin with a type is
// dialled when that is there; the server has [TypeTimeout] for it.
func (o *Outbound) Stream(ctx context.Context, to catalog.Key, service string, c *net.TCPConn) {
	remove, ok := o.open.Add(c)
	if !ok { // stopping
		pipe.Abort(c)
		return
	}
	defer remove()
	if err := o.o.Refuse(to); err != nil {
		o.refuse(to, service, err, c)
		return
	}
	first := Untyped
	if slices.Contains(o.o.Typed, service) {
		var err error
		if first, err = peekType(ctx, c); err != nil {
			o.untyped(to, service, err, c)
			return
		}
	}
	far, err := o.reach(ctx, to, service, first)
	if err != nil {
		o.refuse(to, service, err, c)
		return
	}
	if far.Told {
		if _, err := c.Read(make([]byte, 1)); err != nil { // it was there, and nobody else reads
			pipe.Abort(far.Conn)
			o.refuse(to, service, err, c)
			return
		}
	}
	o.join(ctx, to, service, c, far.Conn)
}

func (o *Outbound) refuse(to catalog.Key, service string, err error, c *net.TCPConn) {
	o.failed(to, service, "peer not reached", err)
	pipe.Abort(c)
}

// untyped ends a connection that has not said what it is. One that ended by
// itself only looked whether somebody answers.
func (o *Outbound) untyped(to catalog.Key, service string, err error, c *net.TCPConn) {
	switch {
	case errors.Is(err, io.EOF):
		_ = c.Close()
	case errors.Is(err, ErrNoType):
		o.refuse(to, service, err, c)
	default: // its server reset it, or this side stops
		o.log.Debug("stream ended before it began", zap.Stringer("peer", to), zap.String("service", service), zap.Error(err))
		pipe.Abort(c)
	}
}
