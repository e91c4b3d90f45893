package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"go.uber.org/zap"

	"culvert/internal/alert"
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

// serve serves one connection to its end. It owns c.
func (g *Gateway) serve(ctx context.Context, c *sniff.Conn, establish mux.Establish) {
	remote := c.RemoteAddr()
	hello, no := g.readHello(c)
	if no != nil {
		g.refuse(c, hello, no)
		return
	}
	if !g.inflight.add(hello.Random) {
		no := &refusal{reasonLoop, alert.InternalError, errors.New("the same hello is being passed on already")}
		g.warnLoop(hello, remote, no.err)
		g.refuse(c, hello, no)
		return
	}
	defer g.inflight.remove(hello.Random)
	to, ok := g.backends.find(hello.ServerName)
	if !ok {
		g.refuse(c, hello, &refusal{reasonUnknownName, alert.UnrecognizedName, errors.New("no route for this name")})
		return
	}
	g.pass(ctx, c, establish, hello, to)
}

// readHello reads the hello and judges it as far as no route is needed.
func (g *Gateway) readHello(c *sniff.Conn) (sniff.Hello, *refusal) {
	err := c.SetReadDeadline(time.Now().Add(g.opts.HelloTimeout))
	var hello sniff.Hello
	if err == nil {
		hello, err = c.Hello()
	}
	if err != nil {
		reason, description := sniff.Verdict(err)
		return hello, &refusal{reason, description, err}
	}
	if hello.ServerName == "" {
		return hello, &refusal{reasonNoServerName, alert.UnrecognizedName, errors.New("client names no server")}
	}
	return hello, nil
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

// pass finds a backend for a connection and joins the two. Until there is one
// the connection is pending, and may be given up for another; packet connections
// are lasting.
func (g *Gateway) pass(ctx context.Context, c *sniff.Conn, establish mux.Establish, hello sniff.Hello, to *backend) {
	start, packets := time.Now(), offersPackets(hello.Protocols)
	dialCtx, cancel := context.WithTimeout(ctx, g.opts.DialTimeout)
	far, endpoint, err := to.pool.Dial(dialCtx)
	cancel()
	if errors.Is(err, errOwnAddress) {
		g.warnLoop(hello, c.RemoteAddr(), err)
		g.refuse(c, hello, &refusal{reasonLoop, alert.InternalError, err})
		return
	}
	log := g.log.With(zap.Stringer("remote", c.RemoteAddr()), zap.String("server_name", hello.ServerName))
	near, peeked := c.Detach()
	if err != nil {
		if ctx.Err() == nil {
			to.flow.dialFailed.Inc()
		}
		log.Debug("no backend", zap.Error(err))
		pipe.Abort(near) // refused is refused: the dialling side shall not wait
		return
	}
	ends := &both{near, far}
	if !establish(packets) {
		ends.Abort()
		return
	}
	defer context.AfterFunc(ctx, ends.Abort)()
	to.flow.ok.Inc()
	defer to.opened(endpoint)()
	if err := ends.tune(packets); err != nil {
		log.Debug("socket options refused", zap.Error(err)) // it works without, only not as well
	}
	if err := ends.replay(peeked, g.opts.DialTimeout); err != nil {
		to.pool.Report(endpoint, err)
		ends.Abort()
		log.Debug("backend lost at once", zap.String("gateway", endpoint), zap.Error(err))
		return
	}
	to.flow.in.Add(float64(len(peeked)))
	result := pipe.Join(near, far, pipe.Options{AtoB: to.flow.in, BtoA: to.flow.out})
	log.Debug("connection ended", zap.String("gateway", endpoint), zap.Duration("lived", time.Since(start)),
		zap.Int64("in", result.AtoB+int64(len(peeked))), zap.Int64("out", result.BtoA), zap.Bool("reset", result.Reset))
}

// both are the two ends of one connection that is passed on.
type both struct {
	net.Conn
	far net.Conn
}

// replay sends the hello on and leaves both ends ready for [pipe.Join].
func (b *both) replay(peeked []byte, budget time.Duration) error {
	if err := b.far.SetWriteDeadline(time.Now().Add(budget)); err != nil {
		return fmt.Errorf("set deadline for hello: %w", err)
	}
	if _, err := b.far.Write(peeked); err != nil {
		return fmt.Errorf("send hello on: %w", err)
	}
	if err := errors.Join(b.far.SetDeadline(time.Time{}), b.SetDeadline(time.Time{})); err != nil {
		return fmt.Errorf("clear deadlines: %w", err)
	}
	return nil
}

// Abort resets both.
func (b *both) Abort() {
	pipe.Abort(b.Conn)
	pipe.Abort(b.far)
}

// tune sets the socket options of both.
func (b *both) tune(packets bool) error {
	set := sockopt.Stream
	if packets {
		set = sockopt.Packet
	}
	var errs []error
	for _, c := range []net.Conn{b.Conn, b.far} {
		if tcp, ok := c.(*net.TCPConn); ok {
			errs = append(errs, set(tcp))
		}
	}
	return errors.Join(errs...)
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
