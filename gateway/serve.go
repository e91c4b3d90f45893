package gateway

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"go.uber.org/zap"

	"culvert/internal/alert"
	"culvert/internal/pause"
	"culvert/internal/pipe"
	"culvert/internal/sockopt"
	"culvert/mux"
	"culvert/sniff"
)

// The reasons for which a TLS connection is refused.
const (
	reasonNoServerName = "no_server_name"
	reasonUnknownName  = "unknown_name"
	reasonLoop         = "loop"
)

func reasons() []string {
	return append(sniff.Reasons(), reasonNoServerName, reasonUnknownName, reasonLoop)
}

// A refusal is why a connection goes no further, and what its client is told.
type refusal struct {
	reason string // "" is not counted
	alert  byte   // 0 for a reset
	err    error
}

// serve serves one connection, to its end or until its relay has it. It owns c.
func (g *Gateway) serve(ctx context.Context, c *sniff.Conn, place *mux.Place) {
	hello, no := g.readHello(c)
	if no != nil {
		g.refuse(c, hello, no)
		return
	}
	if !g.inflight.add(hello.Random) {
		no := &refusal{reasonLoop, alert.InternalError, errors.New("the same hello is being passed on already")}
		g.warnLoop(hello, c.RemoteAddr(), no.err)
		g.refuse(c, hello, no)
		return
	}
	p := &passage{g: g, random: hello.Random}
	if !p.begin(ctx, c, place, hello) {
		g.inflight.remove(hello.Random)
	}
}

// readHello reads the hello and judges it as far as no route is needed.
func (g *Gateway) readHello(c *sniff.Conn) (sniff.Hello, *refusal) {
	hello, err := g.awaitHello(c)
	if err != nil {
		reason, description := sniff.Verdict(err)
		return hello, &refusal{reason, description, err}
	}
	if hello.ServerName == "" {
		return hello, &refusal{reasonNoServerName, alert.UnrecognizedName, errors.New("client names no server")}
	}
	return hello, nil
}

// awaitHello has a time limit only where there is something to wait for: most hellos
// have come whole with their first byte.
func (g *Gateway) awaitHello(c *sniff.Conn) (sniff.Hello, error) {
	if c.HasHello() {
		return c.Hello()
	}
	if err := c.SetReadDeadline(time.Now().Add(g.opts.HelloTimeout)); err != nil {
		return sniff.Hello{}, err
	}
	hello, err := c.Hello()
	if err == nil {
		err = c.SetReadDeadline(time.Time{})
	}
	return hello, err
}

// refuse counts and ends a connection that goes no further.
func (g *Gateway) refuse(c net.Conn, hello sniff.Hello, no *refusal) {
	if no.reason != "" {
		g.metrics.refused.WithLabelValues(no.reason).Inc()
	}
	g.log.Debug("connection refused", zap.Stringer("remote", c.RemoteAddr()), zap.String("reason", no.reason),
		zap.String("server_name", hello.ServerName), zap.Error(no.err))
	if no.alert == 0 {
		pipe.Abort(c)
		return
	}
	alert.Refuse(c, no.alert)
}

// warnLoop tells of a loop: it is a mistake in the configuration of this gateway
// or of its neighbours, and each connection that runs into it would say so.
func (g *Gateway) warnLoop(hello sniff.Hello, remote net.Addr, err error) {
	if suppressed, ok := g.warned.Allow(reasonLoop); ok {
		g.log.Warn("connection leads back to this gateway", zap.String("server_name", hello.ServerName),
			zap.Stringer("remote", remote), zap.Int("suppressed", suppressed), zap.Error(err))
	}
}

// A passage is one connection that is passed on.
type passage struct {
	g        *Gateway
	random   [32]byte
	to       *backend
	near     net.Conn // for the log
	endpoint string
	hello    int // bytes of it
	leave    func()
}

// begin finds a backend for a connection and joins the two, and reports whether they
// are. Until there is a backend the connection is pending, and may be given up for
// another; packet connections are lasting.
func (p *passage) begin(ctx context.Context, c *sniff.Conn, place *mux.Place, hello sniff.Hello) bool {
	g, ok := p.g, false
	if p.to, ok = g.backends.find(hello.ServerName); !ok {
		g.refuse(c, hello, &refusal{reasonUnknownName, alert.UnrecognizedName, errors.New("no route for this name")})
		return false
	}
	dialCtx, cancel := pause.Within(ctx, g.opts.DialTimeout)
	far, endpoint, err := p.to.pool.Dial(dialCtx)
	cancel()
	if errors.Is(err, errOwnAddress) {
		g.warnLoop(hello, c.RemoteAddr(), err)
		g.refuse(c, hello, &refusal{reasonLoop, alert.InternalError, err})
		return false
	}
	near, peeked := c.Detach()
	if err != nil {
		if ctx.Err() == nil {
			p.to.flow.dialFailed.Inc()
		}
		g.log.Debug("no backend", zap.Stringer("remote", near.RemoteAddr()), zap.String("server_name", hello.ServerName), zap.Error(err))
		pipe.Abort(near) // refused is refused: the dialling side shall not wait
		return false
	}
	packets := offersPackets(hello.Protocols)
	if !place.Establish(packets) {
		pipe.Abort(near)
		pipe.Abort(far)
		return false
	}
	if packets {
		g.tune(near, far)
	}
	if log := g.log.Check(zap.DebugLevel, "connection passed on"); log != nil {
		log.Write(zap.Stringer("remote", near.RemoteAddr()), zap.String("server_name", hello.ServerName), zap.String("gateway", endpoint))
	}
	p.near, p.endpoint, p.hello = near, endpoint, len(peeked)
	p.to.flow.ok.Inc()
	p.to.opened(endpoint)
	place.Keep(func(leave func()) (abort func()) {
		p.leave = leave
		return g.relays.Join(near, far, pipe.Options{AtoB: p.to.flow.in, BtoA: p.to.flow.out, First: peeked}, p.end)
	})
	sniff.Recycle(peeked)
	return true
}

// end is the end of a connection that was passed on.
func (p *passage) end(r pipe.Result) {
	if r.Err != nil && r.AtoB < int64(p.hello) && !errors.Is(r.Err, net.ErrClosed) {
		p.to.pool.Report(p.endpoint, r.Err) // it takes connections, and no hello
	}
	p.g.inflight.remove(p.random)
	p.to.closed(p.endpoint)
	if log := p.g.log.Check(zap.DebugLevel, "connection ended"); log != nil {
		log.Write(zap.Stringer("remote", p.near.RemoteAddr()), zap.String("gateway", p.endpoint), zap.Int64("in", r.AtoB), zap.Int64("out", r.BtoA), zap.Bool("reset", r.Reset))
	}
	p.leave()
}

// tune sets the socket options of a packet connection at both ends. They have those
// of streams.
func (g *Gateway) tune(ends ...net.Conn) {
	for _, c := range ends {
		var err error
		switch c := c.(type) {
		case interface {
			Control(f func(fd int) error) error
		}:
			err = c.Control(sockopt.PacketSocket)
		case *net.TCPConn: // where there are no loops
			err = sockopt.Packet(c)
		}
		if err != nil {
			g.log.Debug("socket options refused", zap.Error(err)) // it works without, only not as well
		}
	}
}

// offersPackets tells connections of gossip packets, which want little queued
// and a quick end, from streams, by the only thing that a gateway can read.
func offersPackets(protocols []string) bool {
	for _, p := range protocols {
		if p == "consul/wan-gossip/packet" || strings.HasPrefix(p, "culvert/packet/") {
			return true
		}
	}
	return false
}
