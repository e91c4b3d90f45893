package sidecar

import (
	"context"
	"net"

	"go.uber.org/zap"

	"culvert/alpn"
	"culvert/capture"
	"culvert/certs"
	"culvert/config"
	"culvert/internal/pipe"
	"culvert/mux"
	"culvert/packet"
	"culvert/sniff"
	"culvert/stream"
)

// packetHandler takes packet connections of verified peers, and hands what
// they carry to the local server. Who a packet is from is what the certificate
// says, never what is in it.
type packetHandler struct{ *Sidecar }

// ServeConn serves one connection to its end.
func (s packetHandler) ServeConn(ctx context.Context, c *alpn.Conn) {
	from, service := c.Peer(), c.Route().Service
	s.warnUndeliverable(c)
	var link *packet.Link // what goes back, if the peer offers to take it
	if from.Node != "" && keyOf(from) != s.self() {
		link = s.links.of(keyOf(from), service)
	}
	if link != nil {
		s.verified.set(keyOf(from), certs.ServerName(from.Node, from.Datacenter, s.cfg.Load().Domain), c)
	}
	deliver := func(packets [][]byte) (int, error) { return s.deliver(from, service, packets) }
	if err := s.receiver.Serve(ctx, c, keyOf(from), link, deliver); err != nil {
		s.log.Debug("packet connection ended", zap.Stringer("peer", from), zap.Stringer("remote", c.RemoteAddr()), zap.Error(err))
	}
}

// deliver hands packets to the local server, from their sender's address.
func (s *Sidecar) deliver(from certs.Identity, service string, packets [][]byte) (int, error) {
	key := keyOf(from)
	switch {
	case from.Node == "":
		return 0, packet.ReasonNoNode
	case key == s.self():
		return 0, packet.ReasonUnknownPeer // whoever it is, it is not us
	}
	n, err := s.capture.Deliver(key, service, packets)
	if err == capture.ErrNoEndpoint { //nolint:errorlint // a sentinel that is never wrapped, on the hot path
		return n, packet.ReasonUnknownPeer
	}
	return n, err
}

// warnUndeliverable says once for each source in a while that a peer's packets
// have no source address here, and will be dropped.
func (s *Sidecar) warnUndeliverable(c *alpn.Conn) {
	from := c.Peer()
	_, known := s.catalog.Load().Peer(keyOf(from))
	if known && from.Node != "" {
		return
	}
	wanted, reason := "a peer of the catalog", packet.ReasonUnknownPeer
	if from.Node == "" {
		wanted, reason = "a certificate that names a node", packet.ReasonNoNode
	}
	suppressed, ok := s.warned.Allow(from.String() + " " + string(reason))
	if !ok {
		return
	}
	s.log.Warn("peer's packets are dropped", zap.Stringer("remote", c.RemoteAddr()), zap.String("reason", string(reason)),
		zap.String("wanted", wanted), zap.String("found", from.String()), zap.Int("suppressed", suppressed))
}

// streamHandler takes streams of verified peers to the local server.
type streamHandler struct{ *Sidecar }

// ServeConn serves one connection to its end.
func (s streamHandler) ServeConn(ctx context.Context, c *alpn.Conn) {
	first := stream.Untyped
	if told := c.Route().Type; told != nil {
		first = stream.Type(told.Byte)
	}
	s.inbound.ServeConn(ctx, keyOf(c.Peer()), c.Route().Service, first, c)
}

// sessionHandler takes the streams of sessions that verified peers have begun.
type sessionHandler struct{ *Sidecar }

// ServeConn serves one session to its end.
func (s sessionHandler) ServeConn(ctx context.Context, c *alpn.Conn) {
	s.inbound.ServeSession(ctx, keyOf(c.Peer()), c)
}

// secure begins TLS with the local server, as its peers would.
func (s *Sidecar) secure(ctx context.Context, server *net.TCPConn) (net.Conn, error) {
	cfg := s.cfg.Load()
	c, err := s.dialer.DialServer(ctx, server, certs.ServerName("", cfg.Datacenter, cfg.Domain))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// passthrough returns what hands connections to another address as they are: those
// that are not TLS, and those of TLS that is not the sidecar's. Each is nil where
// nothing is to be passed through.
func (s *Sidecar) passthrough(listen config.Listen) (plain mux.Handler, foreign mux.HandlerFunc) {
	if listen.Passthrough == "" {
		return nil, nil
	}
	pass := s.passTo(listen.Passthrough)
	if listen.PassthroughTLS {
		foreign = pass
	}
	return pass, foreign
}

func (s *Sidecar) passTo(address string) mux.HandlerFunc {
	return func(ctx context.Context, c *sniff.Conn, establish mux.Establish) {
		dialer := net.Dialer{Timeout: passthroughDialTimeout}
		to, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			s.log.Warn("passthrough", zap.String("address", address), zap.Error(err))
			pipe.Abort(c)
			return
		}
		from, peeked := c.Detach()
		abort := func() { pipe.Abort(from); pipe.Abort(to) }
		stop := context.AfterFunc(ctx, abort)
		defer stop()
		// What was looked at, a hello at most, is less than a new socket takes at once.
		if _, err := to.Write(peeked); err != nil || !establish(false) {
			abort()
			return
		}
		pipe.Join(from, to, pipe.Options{})
	}
}
