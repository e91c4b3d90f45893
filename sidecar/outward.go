package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/locator"
	"culvert/packet"
	"culvert/stream"
)

const passthroughDialTimeout = 5 * time.Second

// handler takes what the local server sends, as capture.Handler asks for it.
type handler struct{ *Sidecar }

// Packet queues a packet on the link to its peer.
func (h handler) Packet(to catalog.Key, service string, payload []byte, more bool) {
	if !h.links.send(to, service, payload, more) {
		h.packets.DroppedOut(packet.ReasonNoRoute)
	}
}

// Stream carries one connection to its peer.
func (h handler) Stream(ctx context.Context, to catalog.Key, service string, c *net.TCPConn) {
	h.outbound.Stream(ctx, to, service, c)
}

var errCritical = errors.New("the peer has stopped renewing its entry in the federation, and no connection to it is up")

// isGone tells why a peer is refused at once, nil if it is not, so that the server does not wait
// for who is not there: the records say that it has stopped renewing its entry, and
// its own connections do not say otherwise. Those who are merely cut off from the
// primary go on.
func (s *Sidecar) isGone(to catalog.Key) error {
	p, ok := s.catalog.Load().Peer(to)
	if !ok || !p.Critical {
		return nil
	}
	links := s.links.status(to)
	if len(links) == 0 || slices.ContainsFunc(links, func(l packet.LinkStatus) bool { return l.State == "up" }) {
		return nil
	}
	return errCritical
}

// newLink makes the link to a peer for one service: what the server sends goes out on
// it, and what comes back is the server's.
func (s *Sidecar) newLink(log *zap.Logger, key linkKey, o packet.LinkOptions) *packet.Link {
	o.Self, o.Log, o.Metrics, o.Receiver = s.self(), log, s.packets, s.receiver
	peer := certs.Identity{Datacenter: key.peer.Datacenter, Node: key.peer.Node, Role: certs.RoleServer} // as dialled, and verified
	o.Deliver = func(packets [][]byte) (int, error) { return s.deliver(peer, key.service, packets) }
	dial := func(ctx context.Context) (packet.Conn, error) { return s.dialPacket(ctx, key.peer, key.service) }
	return packet.NewLink(dial, o)
}

func (s *Sidecar) dialPacket(ctx context.Context, to catalog.Key, service string) (packet.Conn, error) {
	c, err := s.dialPeer(ctx, to, func(ctx context.Context, raw net.Conn, name string) (*alpn.Conn, error) {
		return s.dialer.Dial(ctx, raw, name, service)
	})
	if err != nil {
		return nil, err // not c: a nil *alpn.Conn is no nil packet.Conn
	}
	return c, nil
}

func (s *Sidecar) dialStream(ctx context.Context, to catalog.Key, want stream.Wanted) (stream.Reached, error) {
	offer := alpn.StreamOffer{Service: want.Service, Session: want.Session}
	if want.First != stream.Untyped {
		first := want.First.Byte()
		offer.First = &first
	}
	c, err := s.dialPeer(ctx, to, func(ctx context.Context, raw net.Conn, name string) (*alpn.Conn, error) {
		return s.dialer.DialStream(ctx, raw, name, offer)
	})
	if err != nil {
		if _, refused := errors.AsType[*alpn.RefusedError](err); refused && beginsTLS(want.First) {
			err = &innerTLSError{to, want.First, err}
		}
		return stream.Reached{}, err
	}
	return stream.Reached{Conn: c, Told: c.Route().Type != nil, Session: c.Route().Kind == alpn.KindSession}, nil
}

// present are the peers whose streams pass through here, and that are there by all
// that is known.
func (s *Sidecar) present() []catalog.Key {
	var out []catalog.Key
	for _, p := range s.carried(s.catalog.Load().Peers) {
		if !p.Critical {
			out = append(out, p.Key)
		}
	}
	return out
}

// beginsTLS tells whether the server's own TLS begins behind a type.
func beginsTLS(first stream.Type) bool {
	return first == alpn.ConsulTLS || first == alpn.ConsulTLSInsecure
}

// An innerTLSError is a connection with TLS of the two servers' own to a peer that
// does not take that from a sidecar: a native server.
type innerTLSError struct {
	to    catalog.Key
	first stream.Type
	err   error
}

func (e *innerTLSError) Error() string {
	return fmt.Sprintf("the local server begins TLS of its own (type byte %d), which only a sidecar of %s could take. "+
		"If that is a native server, set verify_outgoing = false in the local server's tls block (internal_rpc): "+
		"the sidecar's TLS is on the way all the same. Or run a sidecar beside %s: %v", int(e.first), e.to, e.to, e.err)
}

func (e *innerTLSError) Unwrap() error { return e.err }

// A handshake makes TLS of a connection with who carries a name.
type handshake func(ctx context.Context, raw net.Conn, name string) (*alpn.Conn, error)

// dialPeer connects to a peer's sidecar by whatever path there is, and makes
// sure that it is that peer's. A gateway that has not heard of the peer yet says so
// by an alert, and the next one is asked at once. A peer that refuses by one is not
// asked again.
func (s *Sidecar) dialPeer(ctx context.Context, to catalog.Key, shake handshake) (*alpn.Conn, error) {
	const tries = 3
	for try := 1; ; try++ {
		c, path, err := s.dialOnce(ctx, to, shake)
		if err == nil {
			return c, nil
		}
		why, refused := errors.AsType[*alpn.RefusedError](err)
		if !refused || why.Answered() || path.Gateway == "" || try == tries || ctx.Err() != nil {
			return nil, err
		}
	}
}

func (s *Sidecar) dialOnce(ctx context.Context, to catalog.Key, shake handshake) (*alpn.Conn, locator.Path, error) {
	raw, path, err := s.locator.Dial(ctx, to)
	if err != nil {
		return nil, path, err
	}
	name := certs.ServerName(to.Node, to.Datacenter, s.cfg.Load().Domain)
	c, err := shake(ctx, raw, name)
	s.locator.Report(to, path, err)
	if err != nil {
		return nil, path, viaError{path, err}
	}
	s.verified.set(to, name, c)
	return c, path, nil
}

func (s *Sidecar) dialServer(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error) {
	return s.capture.DialServer(ctx, from, service)
}

// A viaError tells by which way a peer was not reached.
type viaError struct {
	path locator.Path
	err  error
}

func (e viaError) Error() string {
	if e.path.Kind == locator.KindDirect {
		return fmt.Sprintf("at %s: %v", e.path.Address, e.err)
	}
	if errors.Is(e.err, syscall.ECONNRESET) { // what a gateway does that cannot go on, and has no other word
		return fmt.Sprintf("through gateway %s, whose own status tells if it has a path on: %v", e.path.Gateway, e.err)
	}
	return fmt.Sprintf("through gateway %s: %v", e.path.Gateway, e.err)
}

func (e viaError) Unwrap() error { return e.err }

// verified is what was established last about each peer, by whichever side has
// dialled.
type verified struct{ peers sync.Map } // catalog.Key -> identity

type identity struct {
	name   string // the server name that its certificate was verified for
	tls    string // the version
	native bool   // it spoke Consul's protocol, not Culvert's
}

func (v *verified) set(to catalog.Key, name string, c *alpn.Conn) {
	v.peers.Store(to, identity{name, c.Version(), c.Route().Native})
}

func (v *verified) get(of catalog.Key) identity {
	id, _ := v.peers.Load(of)
	known, _ := id.(identity) // absent is zero
	return known
}

func (v *verified) forget(of catalog.Key) { v.peers.Delete(of) }
