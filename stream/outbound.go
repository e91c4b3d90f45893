package stream

import (
	"context"
	"net"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/connset"
	"culvert/internal/pipe"
)

// DialTimeout is how long a peer has to be reached, TLS handshake included.
const DialTimeout = 10 * time.Second

// A DialPeer connects to a peer's service. The connection is the caller's; it
// should have CloseWrite and Abort methods.
type DialPeer func(ctx context.Context, to catalog.Key, service string) (net.Conn, error)

// OutboundOptions configure an [Outbound].
type OutboundOptions struct {
	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

// Outbound carries connections of the local server to its peers.
type Outbound struct {
	*relays
	dial DialPeer
	open *connset.Set // those of the local server
}

// NewOutbound returns an Outbound that reaches peers with dial.
func NewOutbound(dial DialPeer, o OutboundOptions) *Outbound {
	return &Outbound{relays: newRelays(out, o.Log, o.Metrics), dial: dial, open: connset.New()}
}

// Drain refuses new streams and waits until those that are open have ended. It
// aborts what is left when ctx ends, and returns how many that were.
func (o *Outbound) Drain(ctx context.Context) int { return o.open.Drain(ctx) }

// Stream connects to the peer and relays until both sides have ended or ctx
// has. It owns c. What the server sends meanwhile waits in the kernel, and a
// server that gives up is noticed when the peer has been reached, after
// [DialTimeout] at the latest.
func (o *Outbound) Stream(ctx context.Context, to catalog.Key, service string, c *net.TCPConn) {
	remove, ok := o.open.Add(c)
	if !ok { // stopping
		pipe.Abort(c)
		return
	}
	defer remove()
	dialCtx, cancel := context.WithTimeout(ctx, DialTimeout)
	far, err := o.dial(dialCtx, to, service)
	cancel()
	if err != nil {
		o.failed(to, service, "peer not reached", err)
		pipe.Abort(c)
		return
	}
	o.join(ctx, to, service, c, far)
}
