package alpn

import (
	"context"
	"crypto/tls"
	"errors"
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

// A Dialer makes TLS connections to a service over raw ones that somebody else
// dialled.
type Dialer struct {
	table   *Table
	creds   Credentials
	timeout time.Duration
	log     *zap.Logger
	metrics *Metrics
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
	conn, err := d.dial(ctx, raw, serverName, service)
	if err != nil {
		d.metrics.dialError.Inc()
		_ = raw.Close() // no reset: it would overtake the alert that tells the server why
		return nil, fmt.Errorf("handshake with %s for %s: %w", serverName, service, err)
	}
	d.metrics.dialOK.Inc()
	d.log.Debug("connected", zap.String("server_name", serverName), zap.String("service", service),
		zap.String("protocol", conn.route.Protocol), zap.Stringer("peer", conn.peer))
	return conn, nil
}

func (d *Dialer) dial(ctx context.Context, raw net.Conn, serverName, service string) (*Conn, error) {
	protos := d.table.Offer(service)
	if len(protos) == 0 {
		return nil, errors.New("no such service")
	}
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	// The deadline for the connection itself; the context covers a cancel.
	if deadline, ok := ctx.Deadline(); ok {
		if err := raw.SetDeadline(deadline); err != nil {
			return nil, fmt.Errorf("set handshake deadline: %w", err)
		}
	}
	w := &wire{raw: raw, metrics: d.metrics}
	t := tls.Client(w, d.creds.ClientConfig(serverName, protos))
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, refused(err)
	}
	return finish(t, w, d.table, d.creds, d.log)
}
