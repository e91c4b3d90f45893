package stream

import (
	"context"
	"net"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pipe"
)

// A DialServer connects to a service of the local server on behalf of a peer,
// within a time limit of its own. The connection is the caller's.
type DialServer func(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error)

// InboundOptions configure an [Inbound].
type InboundOptions struct {
	Log     *zap.Logger // nil: none
	Metrics *Metrics    // nil: of its own
}

// Inbound carries connections of peers to the local server.
type Inbound struct {
	*relays
	dial DialServer
}

// NewInbound returns an Inbound that reaches the local server with dial.
func NewInbound(dial DialServer, o InboundOptions) *Inbound {
	return &Inbound{relays: newRelays(in, o.Log, o.Metrics), dial: dial}
}

// ServeConn connects to the local server and relays until both sides have ended
// or ctx has. It owns c, which should have CloseWrite and Abort methods. A
// server that refuses is passed on as a reset.
func (i *Inbound) ServeConn(ctx context.Context, from catalog.Key, service string, c net.Conn) {
	server, err := i.dial(ctx, from, service)
	if err != nil {
		i.failed(from, service, "the local server does not take a stream", err)
		pipe.Abort(c)
		return
	}
	i.join(ctx, from, service, server, c)
}
