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

// A DialPeer connects to a peer's service. The connection is the caller's; it
// should have CloseWrite and Abort methods. first is the byte that the connection
// begins with, or [Untyped] of a service without types; told says that the peer
// knows it by then and wants what comes behind it.
type DialPeer func(ctx context.Context, to catalog.Key, service string, first Type) (c net.Conn, told bool, err error)

// OutboundOptions configure an [Outbound].
type OutboundOptions struct {
	// Typed are the services whose connections begin with a byte that tells
	// what they are.
	Typed []string
	// Refuse tells why a peer is not even to be dialled now; nil goes on. A nil
	// function refuses nobody.
	Refuse  func(to catalog.Key) error
	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

// Outbound carries connections of the local server to its peers.
type Outbound struct {
	*relays
	o    OutboundOptions
	dial DialPeer
	open *connset.Set // those of the local server
}

// NewOutbound returns an Outbound that reaches peers with dial.
func NewOutbound(dial DialPeer, o OutboundOptions) *Outbound {
	if o.Refuse == nil {
		o.Refuse = func(catalog.Key) error { return nil }
	}
	return &Outbound{relays: newRelays(out, o.Log, o.Metrics), o: o, dial: dial, open: connset.New()}
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
	dialCtx, cancel := context.WithTimeout(ctx, DialTimeout)
	far, told, err := o.dial(dialCtx, to, service, first)
	cancel()
	if err != nil {
		o.refuse(to, service, err, c)
		return
	}
	if told {
		if _, err := c.Read(make([]byte, 1)); err != nil { // it was there, and nobody else reads
			pipe.Abort(far)
			o.refuse(to, service, err, c)
			return
		}
	}
	o.join(ctx, to, service, c, far)
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
