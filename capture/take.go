package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pause"
	"culvert/internal/pipe"
)

// servePackets reads what is sent to a service of any peer until the socket is
// closed.
func (r *Redirect) servePackets(ctx context.Context, s *redirectSocket) {
	for {
		n, err := s.inlet.next()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// The error of a datagram sent earlier, as a rule: the socket lives.
			if !pause.For(ctx, shortestBackoff) {
				return
			}
			continue
		}
		routes, out := r.routes.Load(), handing{Handler: r.o.Handler, service: s.service.Name}
		for i := range n {
			payload, from, endpoint := s.inlet.at(i)
			to, ok := routes.owners[endpoint]
			switch {
			case !ok, !r.local.contains(from.Addr()):
				r.stray(s, from.Addr(), endpoint)
			case r.probed.isPacket(payload):
				_, _ = s.voice.send(&r.outlets, [][]byte{payload}, routes.endpoints[to].control, sockaddr(from)) // lost like any datagram
			default:
				out.packet(to, payload)
			}
		}
		out.flush()
	}
}

// handing gives a handler packets, each of them as soon as it is known whether the
// next one is for the same peer.
type handing struct {
	Handler
	service string
	to      catalog.Key
	last    []byte // nil: none
}

func (h *handing) packet(to catalog.Key, payload []byte) {
	if h.last != nil {
		h.Packet(h.to, h.service, h.last, to == h.to)
	}
	h.to, h.last = to, payload
}

func (h *handing) flush() {
	if h.last != nil {
		h.Packet(h.to, h.service, h.last, false)
	}
}

// takeProbe ends a connection of the sidecar's own, and reports whether it is one.
func (r *Redirect) takeProbe(c *net.TCPConn) bool {
	if !r.probed.isStream(addrOf(c.RemoteAddr())) {
		return false
	}
	_ = c.Close()
	return true
}

// serveStream serves one connection to a service of whatever peer it was for.
func (r *Redirect) serveStream(ctx context.Context, s *redirectSocket, c *net.TCPConn) {
	endpoint := addrOf(c.LocalAddr()).Addr()
	to, ok := r.routes.Load().owners[endpoint]
	switch {
	case !ok, !r.local.contains(remoteOf(c)):
		r.stray(s, remoteOf(c), endpoint)
		pipe.Abort(c)
	default:
		r.o.Handler.Stream(ctx, to, s.service.Name, c)
	}
}

// stray notes what came to the port of a service's endpoints and not by way of
// the rules: for none of them, or from another host.
func (r *Redirect) stray(s *redirectSocket, from, to netip.Addr) {
	r.o.Metrics.countRefused(s.service.Packet)
	if r.warned.allow(time.Now()) {
		r.log.Warn("refused what was not for an endpoint", zap.Stringer("remote", from), zap.Stringer("to", to),
			zap.Uint16("port", s.port), zap.String("service", s.service.Name))
	}
}
