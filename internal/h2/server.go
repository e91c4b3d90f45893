package h2

import (
	"context"
	"crypto/tls"
	"log"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"
)

// The defaults of [ServerOptions].
const (
	DefaultMaxStreams  = 64
	DefaultIdleTimeout = 3 * time.Minute
	// DefaultCloseTimeout leaves room for the second that net/http waits after
	// its GOAWAY, and ends before mux cuts off what lingers.
	DefaultCloseTimeout = 1500 * time.Millisecond
)

// ServerOptions configure a [Server]. Zero means the default of the same name.
type ServerOptions struct {
	// MaxStreams bounds the requests that one connection has under way.
	MaxStreams int
	// IdleTimeout is how long a connection is kept without a request.
	IdleTimeout time.Duration
	// CloseTimeout is how long a connection has, once it is told to go, to end
	// the requests that are under way.
	CloseTimeout time.Duration
	// Log receives what goes wrong. Nil means no log.
	Log *zap.Logger
}

// A Server serves HTTP/2 on the connections that it is given.
type Server struct {
	handler http.Handler
	opts    ServerOptions
	log     *zap.Logger
	errors  *log.Logger // of net/http: what clients did wrong

	closeOnce sync.Once
	closing   chan struct{} // by Close
	conns     tally
}

// NewServer returns a Server for a handler. Its requests carry the state of their
// connection in TLS, and their context ends when the connection does or is told
// to go, see [Server.ServeConn].
func NewServer(handler http.Handler, o ServerOptions) *Server {
	if o.MaxStreams == 0 {
		o.MaxStreams = DefaultMaxStreams
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = DefaultIdleTimeout
	}
	if o.CloseTimeout == 0 {
		o.CloseTimeout = DefaultCloseTimeout
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	s := &Server{handler: handler, opts: o, log: o.Log.Named("h2"), closing: make(chan struct{})}
	s.errors, _ = zap.NewStdLogAt(s.log, zap.DebugLevel) // an error is a level that does not exist
	return s
}

// ServeConn serves c, which it owns, and returns when c is closed and the handlers
// of its requests have returned.
//
// When ctx ends, or at [Server.Close], the connection is told to go: the contexts
// of its requests end, so that what waits can answer, and the client is sent a
// GOAWAY, so that it makes its next request elsewhere. What is under way after
// CloseTimeout is cut off.
func (s *Server) ServeConn(ctx context.Context, c *tls.Conn) {
	if ctx.Err() != nil || !s.conns.enter() {
		_ = c.NetConn().Close()
		return
	}
	defer s.conns.leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	// One server a connection: net/http's tells all of its connections to go or
	// none, and these come and go by themselves.
	var requests tally
	ln := &listener{conn: c, ended: make(chan struct{})}
	srv := s.server(ctx, ln, &requests)
	_ = srv.Serve(ln) // it goes on by itself; the error says that there is no other connection
	select {
	case <-ln.ended:
	case <-ctx.Done():
		s.dismiss(ctx, srv, ln)
	case <-s.closing:
		cancel()
		s.dismiss(ctx, srv, ln)
	}
	requests.close()
}

// server is net/http's server for one connection.
func (s *Server) server(ctx context.Context, ln *listener, requests *tally) *http.Server {
	http2 := config()
	http2.MaxConcurrentStreams = s.opts.MaxStreams
	return &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !requests.enter() {
				return // the connection has gone
			}
			defer requests.leave()
			defer s.recovered(r)
			s.handler.ServeHTTP(w, r)
		}),
		Protocols:      only(),
		HTTP2:          http2,
		MaxHeaderBytes: MaxHeaderBytes,
		// HTTP/2 has no use for it: who stops amid a header cannot answer the
		// ping either.
		ReadHeaderTimeout: PingAfter,
		IdleTimeout:       s.opts.IdleTimeout,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				ln.end()
			}
		},
		ErrorLog: s.errors,
	}
}

// recovered logs a handler's panic and lets its request alone fail.
func (s *Server) recovered(r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if p != http.ErrAbortHandler { //nolint:errorlint // a sentinel that is thrown as it is
		s.log.Error("panic while serving a request", zap.String("remote", r.RemoteAddr), zap.String("path", r.URL.Path),
			zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
	}
	panic(http.ErrAbortHandler)
}

// dismiss tells a connection to go and waits until it has gone. ctx has ended.
func (s *Server) dismiss(ctx context.Context, srv *http.Server, ln *listener) {
	_ = srv.Shutdown(ctx) // sends the GOAWAY, and waits for nothing more
	t := time.NewTimer(s.opts.CloseTimeout)
	defer t.Stop()
	select {
	case <-ln.ended:
	case <-t.C:
		// Not c.Close, which could wait for a peer that does not read.
		_ = ln.conn.NetConn().Close()
		<-ln.ended
	}
}

// Close tells every connection to go, as the end of its context would, and waits
// until all have gone. Connections that come later are closed. It may be called
// more than once.
func (s *Server) Close() {
	s.closeOnce.Do(func() { close(s.closing) })
	s.conns.close()
}

// A listener is net/http's view of one connection: it is accepted once, and then
// there is none.
type listener struct {
	conn     *tls.Conn
	accepted bool // touched by the goroutine of Serve alone

	endOnce sync.Once
	ended   chan struct{} // net/http has done with the connection
}

// Accept returns the connection, and no other.
func (l *listener) Accept() (net.Conn, error) {
	if l.accepted {
		return nil, net.ErrClosed
	}
	l.accepted = true
	return l.conn, nil
}

// Close does nothing: nobody waits in Accept.
func (l *listener) Close() error { return nil }

// Addr is the address that the connection was accepted on.
func (l *listener) Addr() net.Addr { return l.conn.LocalAddr() }

func (l *listener) end() { l.endOnce.Do(func() { close(l.ended) }) }
