package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/stream/session"
)

// A DialServer connects to a service of the local server on behalf of a peer,
// within a time limit of its own. The connection is the caller's.
type DialServer func(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error)

// InboundOptions configure an [Inbound].
type InboundOptions struct {
	// Datacenter is the own one.
	Datacenter string
	// Typed are the services whose connections begin with a byte that tells
	// what they are, and what follows from it.
	Typed map[string]TypeRules
	// Services are those that streams of a session may be for.
	Services []string
	Log      *zap.Logger // nil: none
	Metrics  *Metrics    // nil: of its own
}

// Inbound carries connections of peers to the local server.
type Inbound struct {
	*relays
	o        InboundOptions
	dial     DialServer
	sessions sessions
}

// NewInbound returns an Inbound that reaches the local server with dial.
func NewInbound(dial DialServer, o InboundOptions) *Inbound {
	return &Inbound{relays: newRelays(in, o.Log, o.Metrics), o: o, dial: dial}
}

// errForeignType is for a type that is taken from the own datacenter alone.
type errForeignType struct {
	Type
	datacenter string
}

func (e errForeignType) Error() string {
	return fmt.Sprintf("type byte %d is taken from servers of %s alone", int(e.Type), e.datacenter)
}

// ServeConn connects to the local server and relays until both sides have ended
// or ctx has. It owns c, which should have CloseWrite and Abort methods. A
// server that refuses is passed on as a reset.
//
// first is the type that the connection was said to be of, and it begins behind
// that byte; [Untyped] where nothing was said. The server gets the byte in any
// case.
func (i *Inbound) ServeConn(ctx context.Context, from catalog.Key, service string, first Type, c net.Conn) {
	rules, typed := i.o.Typed[service]
	if typed && first == Untyped {
		var err error
		if first, err = readType(ctx, c); err != nil {
			i.untyped(from, service, err, c)
			return
		}
	}
	if slices.Contains(rules.SameDatacenter, first) && from.Datacenter != i.o.Datacenter {
		i.failed(from, service, "peer refused", errForeignType{first, i.o.Datacenter})
		turnAway(c, session.NotAllowed)
		return
	}
	server, err := i.dial(ctx, from, service)
	if err != nil {
		i.refuse(from, service, err, c)
		return
	}
	if !typed {
		i.begin(ctx, from, service, server, c)
		return
	}
	secured, err := i.open(ctx, rules, first, server)
	if err != nil {
		pipe.Abort(server)
		i.refuse(from, service, err, c)
		return
	}
	i.received(from, service, 1)
	i.begin(ctx, from, service, secured, c)
}

// begin relays, once a peer that asks for an answer has it.
func (i *Inbound) begin(ctx context.Context, from catalog.Key, service string, server, c net.Conn) {
	if st, ok := c.(*session.Stream); ok {
		if err := st.Answer(session.OK); err != nil {
			pipe.Abort(server)
			pipe.Abort(c)
			return
		}
	}
	i.join(ctx, from, service, server, c)
}

// turnAway refuses a connection, with the reason where its protocol has room for
// one.
func turnAway(c net.Conn, why session.Status) {
	if st, ok := c.(*session.Stream); ok {
		_ = st.Answer(why) // where it fails the session has ended
	}
	pipe.Abort(c)
}

// open tells the local server what a connection is, and makes TLS of it where the
// server wants that and there is none.
func (i *Inbound) open(ctx context.Context, rules TypeRules, first Type, server *net.TCPConn) (net.Conn, error) {
	var to net.Conn = server
	if rules.Secure != nil && !slices.Contains(rules.TLS, first) {
		if err := tell(server, rules.TLSFor); err != nil {
			return nil, err
		}
		var err error
		if to, err = rules.Secure(ctx, server); err != nil {
			return nil, fmt.Errorf("begin TLS: %w", err)
		}
	}
	return to, tell(to, first)
}

// tell writes a type, which a new connection takes at once.
func tell(c net.Conn, first Type) error {
	_, err := c.Write([]byte{first.Byte()})
	return err
}

func (i *Inbound) refuse(from catalog.Key, service string, err error, c net.Conn) {
	i.failed(from, service, "the local server does not take a stream", err)
	turnAway(c, session.ServerDown)
}

// untyped ends a connection that has not said what it is. One that ended by
// itself only looked whether somebody answers.
func (i *Inbound) untyped(from catalog.Key, service string, err error, c net.Conn) {
	if errors.Is(err, io.EOF) {
		_ = c.Close()
		return
	}
	if errors.Is(err, ErrNoType) {
		i.failed(from, service, "peer refused", err)
	}
	pipe.Abort(c)
}
