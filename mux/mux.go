// Package mux is the inbound side's front door: it accepts connections within
// limits, looks at the first byte, and hands TLS to one handler and the rest
// to another.
//
//	s, err := mux.New(ln, mux.Options{TLS: terminator, Metrics: m})
//	if err != nil { ... }
//	err = s.Run(ctx) // until ctx ends
//
// Each phase has its limit. Connections beyond MaxConns wait in the kernel;
// those of one source beyond MaxConnsPerSource are closed; one that sends
// nothing is closed after FirstByteTimeout. What comes after the first byte is
// its handler's business, which tells when the connection is established: until
// then it is pending, may be anybody's, and is one of MaxPending at most. Where
// there is one more, the oldest of the source that has the most makes room.
//
// When Run's context ends, or the listener does, the listener is closed and
// what is pending is reset at once: a stranger's half a hello has nothing to
// lose and delays no stop. Established connections have DrainTimeout to end by
// themselves and are reset then. Those that never end by themselves, as packet
// connections, go on meanwhile; when the others are gone their contexts end, and
// they have LingerTimeout. Run waits for handlers, but no longer than
// [AbortTimeout] after that.
//
// A [Server]'s methods may be called from any goroutine.
package mux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"culvert/internal/connset"
	"culvert/internal/pause"
	"culvert/internal/pipe"
	"culvert/internal/sample"
	"culvert/sniff"
)

// The defaults of [Options].
const (
	DefaultMaxConns          = 4096
	DefaultMaxConnsPerSource = 512
	DefaultFirstByteTimeout  = 10 * time.Second
	DefaultDrainTimeout      = 5 * time.Second
	DefaultLingerTimeout     = 2 * time.Second
	DefaultMaxPending        = 512
)

const (
	minBackoff = 5 * time.Millisecond
	maxBackoff = time.Second
	// AbortTimeout is how long handlers have to return when their connections
	// have been cut off.
	AbortTimeout = 5 * time.Second
	// tlsHandshake is the first byte of TLS: a record of type handshake
	// (RFC 8446 section 5.1).
	tlsHandshake = 0x16
	// maxIdleWorkers bounds the goroutines that wait for a connection.
	maxIdleWorkers = 16
	// helloBytes bounds the memory of all large ClientHellos that are being
	// read at once.
	helloBytes = 16 << 20
)

// A Handler serves one connection. It owns c, closes it, returns when it is done
// with it (its place among MaxConns is free then), and returns soon after ctx has
// ended. As soon as it knows that the connection is wanted it calls establish,
// which is an [Establish].
type Handler interface {
	ServeConn(ctx context.Context, c *sniff.Conn, establish func(lasting bool) bool)
}

// Establish takes a connection out of the pending ones. One that is lasting does
// not end by itself: when the server stops, the others are waited for first, and
// then the end of the context asks it to go. It reports false where the server
// has given the connection up already; the handler closes it then and returns.
type Establish = func(lasting bool) bool

// HandlerFunc makes a [Handler] of a function.
type HandlerFunc func(ctx context.Context, c *sniff.Conn, establish Establish)

// ServeConn calls f.
func (f HandlerFunc) ServeConn(ctx context.Context, c *sniff.Conn, establish func(lasting bool) bool) {
	f(ctx, c, establish)
}

// Options configure a [Server]. Zero means the default of the same name.
type Options struct {
	// MaxConns bounds the connections that are open at once.
	MaxConns int
	// MaxConnsPerSource bounds those of one address, for IPv6 of one /64.
	MaxConnsPerSource int
	// MaxPending bounds the connections that are not established. It should be
	// well below MaxConns.
	MaxPending int
	// FirstByteTimeout bounds the wait for the first byte.
	FirstByteTimeout time.Duration
	// DrainTimeout is how long established connections have to end when the
	// server stops, and LingerTimeout how long the lasting ones have after them.
	DrainTimeout, LingerTimeout time.Duration
	// Drain is what else the lasting connections go on for when the server
	// stops: it is called once, its context ends after DrainTimeout, and it
	// should return then. Nil means nothing else.
	Drain func(ctx context.Context)
	// TLS serves connections that begin like TLS. Required without Pass.
	TLS Handler
	// Pass serves them in its place. It has the duties of a [Handler] and may hand
	// a connection on with [Place.Keep], so that what only waits costs no goroutine.
	Pass func(ctx context.Context, c *sniff.Conn, p *Place)
	// Plain serves the others. Nil means that they are closed and counted.
	Plain Handler
	// Log receives what goes wrong. Nil means no log.
	Log *zap.Logger
	// Metrics counts. Nil means no counts.
	Metrics *Metrics
}

func (o Options) withDefaults() (Options, error) {
	for _, n := range []struct {
		name  string
		value *int
		def   int
	}{
		{"MaxConns", &o.MaxConns, DefaultMaxConns},
		{"MaxConnsPerSource", &o.MaxConnsPerSource, DefaultMaxConnsPerSource},
		{"MaxPending", &o.MaxPending, DefaultMaxPending},
	} {
		if *n.value < 0 {
			return o, fmt.Errorf("mux: %s is %d, must not be negative", n.name, *n.value)
		}
		if *n.value == 0 {
			*n.value = n.def
		}
	}
	for _, d := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"FirstByteTimeout", &o.FirstByteTimeout, DefaultFirstByteTimeout},
		{"DrainTimeout", &o.DrainTimeout, DefaultDrainTimeout},
		{"LingerTimeout", &o.LingerTimeout, DefaultLingerTimeout},
	} {
		if *d.value < 0 {
			return o, fmt.Errorf("mux: %s is %v, must not be negative", d.name, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if o.TLS == nil && o.Pass == nil {
		return o, errors.New("mux: TLS is required")
	}
	if o.Drain == nil {
		o.Drain = func(context.Context) {}
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	return o, nil
}

// A Server accepts connections on one listener. Make one with [New].
type Server struct {
	ln     net.Listener
	o      Options
	log    *zap.Logger
	slots  chan struct{}
	hellos *sniff.Budget
	ran    atomic.Bool
	wg     sync.WaitGroup
	work   chan net.Conn // to workers that wait
	idle   atomic.Int32  // how many those are
	warn   sample.Sampler

	pending pending
	ending  *connset.Set // established, and end by themselves
	lasting *connset.Set // established, and do not

	mu      sync.Mutex
	sources map[netip.Prefix]int // connections open from each
}

// New returns a server for ln, which it owns from then on, unless there is an
// error.
func New(ln net.Listener, o Options) (*Server, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Server{
		ln: ln, o: o, log: o.Log.Named("mux"), slots: make(chan struct{}, o.MaxConns), hellos: sniff.NewBudget(helloBytes), work: make(chan net.Conn),
		pending: pending{max: o.MaxPending}, ending: connset.New(), lasting: connset.New(), sources: make(map[netip.Prefix]int),
	}, nil
}

// Addr is the listener's address.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Close gives up a server that was never run.
func (s *Server) Close() error { return s.ln.Close() }

// Run accepts until ctx ends, then drains. It returns nil after such a stop, and
// the listener's error if that ended by itself. Handlers that do not return are an
// error too: their goroutines are left behind. It runs once.
func (s *Server) Run(ctx context.Context) error {
	if s.ran.Swap(true) {
		return errors.New("mux: run twice")
	}
	front, stop := context.WithCancel(ctx)
	defer stop()
	// Handlers see two contexts, each its own: they end with the drain's
	// phases, the lasting ones' before the others'.
	handlers, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	lasting, release := context.WithCancel(handlers)
	defer release()
	context.AfterFunc(front, func() { _ = s.ln.Close() })
	err := s.accept(front, handlers, lasting)
	stop()
	_ = s.ln.Close()
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, s.drain(handlers, release, cut))
}

// drain ends what is open, phase by phase. Where handlers are cut off, their
// connections go before their contexts: a handler that closes its own at the end
// of its context would let a stream that was cut look complete to the peer.
// Handlers see [net.ErrClosed] and know that it was not the peer.
func (s *Server) drain(ctx context.Context, release, cut context.CancelFunc) error {
	for _, c := range s.pending.close() {
		c.giveUp()
	}
	left := s.drainEnding(ctx)
	release()
	limit, cancel := context.WithTimeout(ctx, s.o.LingerTimeout)
	defer cancel()
	left += s.lasting.Drain(limit)
	cut()
	if left > 0 {
		s.log.Info("connections cut off at the end of the drain", zap.Int("connections", left))
	}
	return s.join()
}

// drainEnding waits for the connections that end by themselves, and for what
// else the lasting ones go on for, and returns how many it cut off.
func (s *Server) drainEnding(ctx context.Context) int {
	limit, cancel := context.WithTimeout(ctx, s.o.DrainTimeout)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { s.o.Drain(limit) })
	left := s.ending.Drain(limit)
	wg.Wait()
	return left
}

// join waits for the handlers, whose connections and contexts have ended.
func (s *Server) join() error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.wg.Wait()
	}()
	t := time.NewTimer(AbortTimeout)
	defer t.Stop()
	select {
	case <-done:
		return nil
	case <-t.C:
		return fmt.Errorf("mux: %d handlers have not returned %v after their connections were cut off", len(s.slots), AbortTimeout)
	}
}

// accept hands connections on until the listener is closed.
func (s *Server) accept(ctx, handlers, lasting context.Context) error {
	backoff := minBackoff
	for {
		if !s.reserve(ctx) {
			return nil
		}
		c, err := s.ln.Accept()
		if err != nil {
			<-s.slots
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept: %w", err)
			}
			s.o.Metrics.acceptErrors.Inc()
			if _, ok := s.warn.Allow("accept"); ok {
				s.log.Error("accept", zap.Error(err)) // out of descriptors, most likely: others may free some
			}
			if !pause.For(ctx, backoff) {
				return nil
			}
			backoff = min(2*backoff, maxBackoff)
			continue
		}
		backoff = minBackoff
		select {
		case s.work <- c:
		default:
			s.wg.Go(func() { s.worker(ctx, handlers, lasting, c) })
		}
	}
}

// worker serves a connection, and then others while there are some: a goroutine that
// has been in use has the stack that it takes. It ends with ctx, as accept does.
func (s *Server) worker(ctx, handlers, lasting context.Context, c net.Conn) {
	for {
		s.serve(handlers, lasting, c)
		if s.idle.Add(1) > maxIdleWorkers {
			s.idle.Add(-1)
			return
		}
		select {
		case c = <-s.work:
			s.idle.Add(-1)
		case <-ctx.Done():
			s.idle.Add(-1)
			return
		}
	}
}

// reserve takes a slot before there is a connection to put in it, so that what
// cannot be served waits in the kernel.
func (s *Server) reserve(ctx context.Context) bool {
	select {
	case s.slots <- struct{}{}:
		return true
	default:
	}
	if _, ok := s.warn.Allow("full"); ok {
		s.log.Warn("no more connections are accepted until one ends", zap.Int("open", cap(s.slots)))
	}
	select {
	case s.slots <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *Server) serve(ctx, lasting context.Context, raw net.Conn) {
	source := sourceOf(raw.RemoteAddr())
	if !s.enter(source) {
		s.refuse(raw, reasonLimitSource, nil)
		<-s.slots
		return
	}
	s.o.Metrics.open.Inc()
	ctx, cancel := context.WithCancel(ctx)
	c := &Place{s: s, raw: raw, conn: sniff.NewConn(raw, s.hellos), source: source, cancel: cancel, released: lasting}
	defer c.returned()
	if !c.enter() { // accepted while the drain began
		pipe.Abort(raw)
		return
	}
	defer s.recovered(raw)
	if first, ok := s.firstByte(c); ok {
		s.dispatch(ctx, c, first)
	}
}

// recovered keeps one connection's panic from the others, as net/http does: the
// bytes that provoke it come from strangers. It is told in full.
func (s *Server) recovered(raw net.Conn) {
	if p := recover(); p != nil {
		s.log.Error("panic while serving a connection", zap.Stringer("remote", raw.RemoteAddr()),
			zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
		pipe.Abort(raw)
	}
}

// firstByte waits for the first byte. Where it returns false, the connection is
// closed.
func (s *Server) firstByte(c *Place) (first byte, ok bool) {
	err := c.raw.SetReadDeadline(time.Now().Add(s.o.FirstByteTimeout))
	if err == nil {
		first, err = c.conn.FirstByte()
	}
	if err == nil {
		err = c.raw.SetReadDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return first, true
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.refuse(c.raw, reasonFirstByteTimeout, err)
	case errors.Is(err, net.ErrClosed): // given up here, and no fault of the peer's
		_ = c.raw.Close()
	default:
		s.refuse(c.raw, reasonClosedEarly, err)
	}
	return 0, false
}

func (s *Server) dispatch(ctx context.Context, c *Place, first byte) {
	switch {
	case first == tlsHandshake && s.o.Pass != nil:
		s.o.Metrics.tls.Inc()
		s.o.Pass(ctx, c.conn, c)
	case first == tlsHandshake:
		s.o.Metrics.tls.Inc()
		s.o.TLS.ServeConn(ctx, c.conn, c.Establish)
	case s.o.Plain != nil:
		s.o.Metrics.plain.Inc()
		s.o.Plain.ServeConn(ctx, c.conn, c.Establish)
	default:
		s.refuse(c.raw, reasonNotTLS, nil)
	}
}

// refuse counts and closes a connection that gets no handler: a stranger's
// noise.
func (s *Server) refuse(c net.Conn, reason string, err error) {
	s.o.Metrics.Refused(reason)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	s.log.Debug("connection refused", zap.Stringer("remote", c.RemoteAddr()), zap.String("reason", reason), zap.Error(err))
	_ = c.Close()
}

func (s *Server) enter(source netip.Prefix) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sources[source] >= s.o.MaxConnsPerSource {
		return false
	}
	s.sources[source]++
	return true
}

func (s *Server) leave(source netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sources[source]--; s.sources[source] == 0 {
		delete(s.sources, source)
	}
}

// sourceOf is whom a connection counts for: an IPv4 address, or the /64 that one
// IPv6 host can fill with addresses.
func sourceOf(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{} // all count together
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(addr, bits).Masked()
}
