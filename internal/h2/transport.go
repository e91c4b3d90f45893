package h2

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// The defaults of [TransportOptions].
const (
	DefaultDialTimeout = 15 * time.Second
	// DefaultIdleConnTimeout is shorter than a server's: who dials closes, so
	// that no request meets a connection that is about to go.
	DefaultIdleConnTimeout = 90 * time.Second
)

// TransportOptions configure [NewTransport]. Zero means the default of the same
// name.
type TransportOptions struct {
	// DialTimeout bounds one dial, its TLS included.
	DialTimeout time.Duration
	// IdleConnTimeout is how long a connection is kept without a request.
	IdleConnTimeout time.Duration
}

// NewTransport returns a transport for https URLs. dial makes the connections:
// address is the URL's host and port, 443 where it names none. A connection that
// it returns is the transport's.
//
// Requests to one host share a connection, also those that wait while it is
// dialled; there is another only while the first has as many requests under way
// as its server takes. A dial goes on when the request that began it is given up,
// as the next one will want it.
//
// The owner calls CloseIdleConnections when it is done. Redirects and the bounds
// of bodies are the business of an [http.Client] and its caller.
func NewTransport(dial func(ctx context.Context, address string) (*tls.Conn, error), o TransportOptions) *http.Transport {
	if o.DialTimeout == 0 {
		o.DialTimeout = DefaultDialTimeout
	}
	if o.IdleConnTimeout == 0 {
		o.IdleConnTimeout = DefaultIdleConnTimeout
	}
	return &http.Transport{
		Protocols: only(),
		HTTP2:     config(),
		DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, o.DialTimeout)
			defer cancel()
			return connect(ctx, dial, address)
		},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("not an https URL")
		},
		// For HTTP/2 these are the connections that are being dialled, and then
		// the one that is not full: without the limit each of many first
		// requests would dial.
		MaxConnsPerHost:        1,
		IdleConnTimeout:        o.IdleConnTimeout,
		MaxResponseHeaderBytes: MaxHeaderBytes,
		DisableCompression:     true, // a few bytes from afar must not become many here
	}
}

func connect(ctx context.Context, dial func(context.Context, string) (*tls.Conn, error), address string) (net.Conn, error) {
	c, err := dial(ctx, address)
	if err != nil {
		return nil, err
	}
	// net/http would speak HTTP/1 on it.
	if p := c.ConnectionState().NegotiatedProtocol; p != protocol {
		_ = c.Close()
		return nil, fmt.Errorf("%s negotiated %q, not %s", address, p, protocol)
	}
	return c, nil
}
