package alpn

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"go.uber.org/zap"

	"culvert/certs"
	"culvert/internal/alert"
	"culvert/internal/pipe"
	"culvert/internal/sample"
	"culvert/sniff"
)

// A Handler serves connections of one kind. It owns c and closes it. ctx ends
// when the connection must go.
type Handler interface {
	ServeConn(ctx context.Context, c *Conn)
}

// HandlerFunc makes a [Handler] of a function.
type HandlerFunc func(ctx context.Context, c *Conn)

// ServeConn calls f.
func (f HandlerFunc) ServeConn(ctx context.Context, c *Conn) { f(ctx, c) }

// ServerOptions configure a [Server].
type ServerOptions struct {
	// Packet, Stream, Session, Raft and HTTP serve the connections of their
	// kind. One that is nil is an error if the table has something of that kind.
	Packet, Stream, Session, Raft, HTTP Handler
	// Foreign takes over connections whose hello offers nothing of the table,
	// or no protocol at all: the local server's own TLS. Nothing of them has
	// been read, and it has ServeConn's duties from there. Nil refuses them.
	Foreign func(ctx context.Context, c *sniff.Conn, establish func(lasting bool) bool)
	// HelloTimeout bounds the wait for a whole ClientHello. 0 means
	// [HelloTimeout].
	HelloTimeout time.Duration
	// HandshakeTimeout bounds the handshake after it. 0 means
	// [HandshakeTimeout].
	HandshakeTimeout time.Duration
	// Refused is called once for each connection that no handler was given,
	// with one of [Reasons]. Nil means that nobody counts.
	Refused func(reason string)
	// Log receives peers' mistakes (warn, sampled by source) and strangers'
	// noise (debug). Nil means no log.
	Log *zap.Logger
	// Metrics may be shared with a [Dialer]. Nil means none.
	Metrics *Metrics
}

// A Server takes connections that begin with TLS, verifies who they come from
// and hands them to the handler of the protocol that was negotiated.
type Server struct {
	table   *Table
	creds   Credentials
	config  *tls.Config
	opts    ServerOptions
	log     *zap.Logger
	metrics *Metrics
	warned  sample.Sampler
	intakes intakes
	turns   turns
}

// NewServer returns a Server for what is in a table.
func NewServer(t *Table, creds Credentials, o ServerOptions) (*Server, error) {
	for _, r := range t.routes {
		if o.handler(r.Kind) == nil {
			return nil, fmt.Errorf("protocol %q: no handler for its kind, %v", r.Protocol, r.Kind)
		}
	}
	if o.HelloTimeout == 0 {
		o.HelloTimeout = HelloTimeout
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = HandshakeTimeout
	}
	if o.Refused == nil {
		o.Refused = func(string) {}
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return &Server{
		table:   t,
		creds:   creds,
		config:  creds.ServerConfig(t.Protocols(), t.admission),
		opts:    o,
		log:     o.Log.Named("alpn"),
		metrics: o.Metrics.orNew(),
		turns:   newTurns(),
	}, nil
}

func (o *ServerOptions) handler(k Kind) Handler {
	switch k {
	case KindPacket:
		return o.Packet
	case KindRaft:
		return o.Raft
	case KindHTTP:
		return o.HTTP
	case KindSession:
		return o.Session
	}
	return o.Stream
}

// ServeConn serves one connection to its end. It owns c. What is wrong with the
// connection is logged and counted here. Once its peer is verified it calls
// establish, with true for all but streams and sessions, whose connections alone
// end by themselves; where that returns false, and when ctx ends before, the connection
// is closed and nothing counted.
func (s *Server) ServeConn(ctx context.Context, c *sniff.Conn, establish func(lasting bool) bool) {
	remote := c.RemoteAddr()
	switch ours, ok := s.admit(c, remote); {
	case !ok:
		return
	case !ours:
		s.opts.Foreign(ctx, c, establish)
		return
	}
	raw, peeked := c.Detach()
	conn, err := s.apart(ctx, raw, peeked)
	switch {
	case ctx.Err() != nil, errors.Is(err, net.ErrClosed), err == nil && !establish(conn.route.Kind.lasting()):
		pipe.Abort(raw) // given up on this side, and no fault of the peer's
		return
	case err != nil:
		s.metrics.acceptError.Inc()
		s.refuse(remote, err)
		// The client may have sent already: in TLS 1.3 it believes itself
		// connected. The alert must reach it all the same.
		alert.Linger(raw)
		return
	}
	s.metrics.acceptOK.Inc()
	s.opts.handler(conn.route.Kind).ServeConn(ctx, conn)
}

// admit reads the hello and refuses what no handshake could serve. Where ok is
// false, c is closed; ours is false for what is to be handed to Foreign.
func (s *Server) admit(c *sniff.Conn, remote net.Addr) (ours, ok bool) {
	reason, description, err := s.judge(c)
	if err == nil {
		return true, true
	}
	if s.opts.Foreign != nil && (reason == reasonNoALPN || reason == reasonUnknownALPN) && c.SetReadDeadline(time.Time{}) == nil {
		return false, true
	}
	if reason != "" {
		s.opts.Refused(reason)
	}
	s.log.Debug("connection refused", zap.Stringer("remote", remote), zap.String("reason", reason), zap.Error(err))
	if description == 0 {
		pipe.Abort(c)
	} else {
		alert.Refuse(c, description)
	}
	return false, false
}

// judge reads the hello. For one that names no protocol of the table, as for none
// at all, the error says why, and reason and description are as in
// [sniff.Verdict].
func (s *Server) judge(c *sniff.Conn) (reason string, description byte, err error) {
	err = c.SetReadDeadline(time.Now().Add(s.opts.HelloTimeout))
	var hello sniff.Hello
	if err == nil {
		hello, err = c.Hello()
	}
	if err != nil {
		reason, description = sniff.Verdict(err)
		return reason, description, err
	}
	if len(hello.Protocols) == 0 {
		return reasonNoALPN, alert.NoApplicationProtocol, errors.New("client names no protocol")
	}
	for _, p := range hello.Protocols {
		if _, ok := s.table.Lookup(p); ok {
			return "", 0, nil
		}
	}
	return reasonUnknownALPN, alert.NoApplicationProtocol, fmt.Errorf("client offers %q", hello.Protocols)
}

// apart makes the handshake in a goroutine of its own. It takes a stack four times
// what the connection takes from then on, and stacks shrink late.
func (s *Server) apart(ctx context.Context, raw net.Conn, peeked []byte) (conn *Conn, err error) {
	done := make(chan any)
	go func() {
		defer func() { done <- recover() }()
		conn, err = s.handshake(ctx, raw, peeked)
	}()
	if p := <-done; p != nil {
		panic(p) // here it is kept from other connections
	}
	return conn, err
}

func (s *Server) handshake(ctx context.Context, raw net.Conn, peeked []byte) (*Conn, error) {
	if err := raw.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return nil, fmt.Errorf("set handshake deadline: %w", err)
	}
	w := newWire(raw, peeked, s.metrics)
	w.turns = s.turns
	t := tls.Server(w, s.config)
	if err := w.inTurn(func() error { return t.HandshakeContext(ctx) }); err != nil {
		return nil, err
	}
	route, err := s.table.negotiated(t)
	if err != nil {
		return nil, err
	}
	return finish(t, w, route, s.creds, &s.intakes, s.log)
}

// finish makes a Conn of a connection whose handshake is done.
func finish(t *tls.Conn, w *wire, route Route, creds Credentials, buffers *intakes, log *zap.Logger) (*Conn, error) {
	peer, err := creds.PeerIdentity(t.ConnectionState())
	if err != nil {
		return nil, err
	}
	if err := tune(w.raw, route.Kind); err != nil {
		log.Debug("socket options refused", zap.Error(err))
	}
	if err := w.raw.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("clear handshake deadline: %w", err)
	}
	c := &Conn{Conn: t, wire: w, peer: peer, route: route}
	if route.Kind == KindPacket {
		w.eager, c.intake = newEager(w.raw), newIntake(t, w.raw, buffers)
	}
	return c, nil
}

// A protocolError is a handshake that ended without a protocol of the table.
type protocolError struct{ negotiated string }

func (e *protocolError) Error() string {
	return fmt.Sprintf("negotiate protocol: no route for %q", e.negotiated)
}

// refuse counts and logs a handshake that came to nothing.
func (s *Server) refuse(remote net.Addr, err error) {
	reason, peerErr := classify(err)
	s.opts.Refused(reason)
	if peerErr == nil {
		s.log.Debug("handshake refused", zap.Stringer("remote", remote), zap.String("reason", reason), zap.Error(err))
		return
	}
	suppressed, ok := s.warned.Allow(sampleKey(remote, reason, peerErr))
	if !ok {
		return
	}
	fields := []zap.Field{
		zap.Stringer("remote", remote), zap.String("reason", reason),
		zap.String("wanted", peerErr.Wanted), zap.String("found", peerErr.Found),
	}
	if suppressed > 0 {
		fields = append(fields, zap.Int("suppressed", suppressed))
	}
	s.log.Warn("peer refused", fields...)
}

// classify gives the one reason for a handshake's error, and the fault of the
// peer's certificate if that was it.
func classify(err error) (string, *certs.PeerError) {
	var peerErr *certs.PeerError
	var protocol *protocolError
	switch {
	case errors.As(err, &peerErr):
		return certPrefix + peerErr.Reason, peerErr
	case errors.As(err, &protocol):
		if protocol.negotiated == "" {
			return reasonNoALPN, nil
		}
		return reasonUnknownALPN, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return reasonHandshakeTimeout, nil
	}
	return reasonHandshake, nil
}

// sampleKey says which warnings are alike: those of one source and reason, and
// where the CA has vouched for the certificate, of one certificate. Others can be
// made at will, a new one for each connection.
func sampleKey(remote net.Addr, reason string, err *certs.PeerError) string {
	source := remote.String()
	if host, _, splitErr := net.SplitHostPort(source); splitErr == nil {
		source = host // the port differs each time
	}
	switch err.Reason {
	case certs.ReasonOtherCA, certs.ReasonNoCertificate, certs.ReasonBadCertificate:
		return source + " " + reason
	}
	return source + " " + reason + " " + err.Found
}
