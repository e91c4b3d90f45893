package alpn

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"
)

// DialerOptions configure a [Dialer].
type DialerOptions struct {
	// HandshakeTimeout bounds a handshake, beside the context. 0 means
	// [HandshakeTimeout].
	HandshakeTimeout time.Duration
	// Log receives what was negotiated, at debug. Nil means no log.
	Log *zap.Logger
	// Metrics may be shared with a [Server]. Nil means none.
	Metrics *Metrics
}

// A Dialer makes TLS connections over raw ones that somebody else dialled.
type Dialer struct {
	table   *Table
	creds   Credentials
	timeout time.Duration
	log     *zap.Logger
	metrics *Metrics
	intakes intakes
}

// NewDialer returns a Dialer that offers the protocols of a table.
func NewDialer(t *Table, creds Credentials, o DialerOptions) *Dialer {
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = HandshakeTimeout
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return &Dialer{
		table: t, creds: creds, timeout: o.HandshakeTimeout,
		log: o.Log.Named("alpn"), metrics: o.Metrics.orNew(),
	}
}

// Dial makes the handshake with serverName over raw, for a service of the table,
// and returns once the server is verified. It owns raw: where it returns an
// error, raw is closed. The error is or wraps a [*certs.PeerError] for a server
// that is not who it should be, a [*RefusedError] for an alert, a context's
// error, or a timeout.
//
// The server has not verified this side by then (RFC 8446 section 4.4.2): a
// refusal comes out of the first Read.
func (d *Dialer) Dial(ctx context.Context, raw net.Conn, serverName, service string) (*Conn, error) {
	return d.offer(ctx, raw, serverName, service, d.table.Offer(service))
}

// DialStream is Dial for a stream. Where the route that was negotiated has a Type,
// the far side has been told of the first byte and takes what comes behind it;
// where its kind is [KindSession], the stream is one of those that it is to carry.
func (d *Dialer) DialStream(ctx context.Context, raw net.Conn, serverName string, o StreamOffer) (*Conn, error) {
	purpose := o.Service
	if purpose == "" {
		purpose = "a session"
	}
	return d.offer(ctx, raw, serverName, purpose, d.table.OfferStream(o))
}

// DialServer makes the handshake with a local server that speaks TLS and knows
// no protocols: nothing is offered, and the route of the connection is empty.
// Otherwise it is as Dial.
func (d *Dialer) DialServer(ctx context.Context, raw net.Conn, serverName string) (*Conn, error) {
	return d.connect(ctx, raw, serverName, "the local server", nil)
}

// DialProtocol is Dial for [Raft] or [HTTP], which the table must have.
func (d *Dialer) DialProtocol(ctx context.Context, raw net.Conn, serverName, protocol string) (*Conn, error) {
	return d.offer(ctx, raw, serverName, protocol, d.table.offerProtocol(protocol))
}

// offer is connect where there must be something to offer.
func (d *Dialer) offer(ctx context.Context, raw net.Conn, serverName, purpose string, protos []string) (*Conn, error) {
	if len(protos) == 0 {
		d.metrics.dialError.Inc()
		_ = raw.Close()
		return nil, fmt.Errorf("handshake with %s for %s: no such service or protocol", serverName, purpose)
	}
	return d.connect(ctx, raw, serverName, purpose, protos)
}

// connect dials with an offer of protocols, and counts and logs what became of
// it. purpose is what the offer is for, in the words of the caller.
func (d *Dialer) connect(ctx context.Context, raw net.Conn, serverName, purpose string, protos []string) (*Conn, error) {
	conn, err := d.handshake(ctx, raw, serverName, protos)
	if err != nil {
		d.metrics.dialError.Inc()
		_ = raw.Close() // no reset: it would overtake the alert that tells the server why
		return nil, fmt.Errorf("handshake with %s for %s: %w", serverName, purpose, err)
	}
	d.metrics.dialOK.Inc()
	d.log.Debug("connected", zap.String("server_name", serverName), zap.String("service", conn.route.Service),
		zap.String("protocol", conn.route.Protocol), zap.Stringer("peer", conn.peer))
	return conn, nil
}

func (d *Dialer) handshake(ctx context.Context, raw net.Conn, serverName string, protos []string) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	// The deadline for the connection itself; the context covers a cancel.
	if deadline, ok := ctx.Deadline(); ok {
		if err := raw.SetDeadline(deadline); err != nil {
			return nil, fmt.Errorf("set handshake deadline: %w", err)
		}
	}
	w := newWire(raw, nil, d.metrics)
	t := tls.Client(w, d.creds.ClientConfig(serverName, protos))
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, refused(err)
	}
	var route Route
	if len(protos) > 0 {
		var err error
		if route, err = d.table.negotiated(t); err != nil {
			return nil, err
		}
	}
	return finish(t, w, route, d.creds, &d.intakes, d.log)
}
