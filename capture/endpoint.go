package capture

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/iproute"
	"culvert/internal/pipe"
)

// maxDatagram is the largest UDP payload there is, plus one byte.
const maxDatagram = 65507 + 1

// An endpointKey is a socket's place in the kernel's tables.
type endpointKey struct {
	addr   netip.AddrPort
	packet bool
}

// An endpoint is one socket on one advertised address. Which peer has that
// address may change while the socket stays.
type endpoint struct {
	key     endpointKey
	service Service
	owner   atomic.Pointer[catalog.Key]
	udp     *socket // one of udp and tcp is set
	server  []byte  // where the server listens, as a sockaddr
	tcp     *net.TCPListener
}

func openEndpoint(key endpointKey, s Service, owner catalog.Key, l *loop) (*endpoint, error) {
	if key.addr.Addr().Is6() {
		if err := iproute.Local(key.addr.Addr()); err != nil {
			return nil, err
		}
	}
	e := &endpoint{key: key, service: s}
	e.owner.Store(&owner)
	var err error
	if key.packet {
		err = e.openPacket(l)
	} else {
		e.tcp, err = listenStream(key.addr)
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

func (e *endpoint) openPacket(l *loop) (err error) {
	e.udp, err = listenPacket(e.key.addr)
	if err != nil {
		return err
	}
	e.server = sockaddr(e.service.Local)
	if err := l.add(e); err != nil {
		e.udp.close()
		return err
	}
	return nil
}

func (e *endpoint) close(l *loop) {
	if e.udp != nil {
		l.remove(e)
		e.udp.close()
		return
	}
	_ = e.tcp.Close()
}

// servePackets reads what the local server has sent to the endpoint's owner, as a
// [loop] asks for it.
func (b *Bind) servePackets(e *endpoint, room *batch) (int, error) {
	n, err := e.udp.receive(room)
	if n == 0 {
		return 0, err
	}
	to, out := *e.owner.Load(), handing{Handler: b.o.Handler, service: e.service.Name}
	for i := range n {
		payload, from, _ := room.at(i)
		switch {
		case from.Addr() != b.o.Server:
			b.wrongSource(e, from.Addr())
		case to == b.o.Self:
			b.o.Metrics.countHairpin(true)
			_, _ = e.udp.send(&b.outlets, [][]byte{payload}, nil, e.server) // lost like any datagram
		default:
			out.packet(to, payload)
		}
	}
	out.flush()
	return n, nil
}

func (b *Bind) wrongSource(e *endpoint, from netip.Addr) {
	b.o.Metrics.countRefused(e.key.packet)
	if e.key.packet && b.o.WrongSource != nil {
		b.o.WrongSource()
	}
	if ok := b.warned.allow(time.Now()); ok {
		b.log.Warn("refused what did not come from the server: server.address must be the address that the server sends from",
			zap.Stringer("remote", from), zap.Stringer("server_address", b.o.Server),
			zap.String("service", e.service.Name), zap.Stringer("peer", *e.owner.Load()))
	}
}

// serveStream serves one connection to the endpoint's owner.
func (b *Bind) serveStream(ctx context.Context, e *endpoint, c *net.TCPConn) {
	if from := remoteOf(c); !b.local.contains(from) {
		b.wrongSource(e, from)
		pipe.Abort(c)
		return
	}
	to := *e.owner.Load()
	if to != b.o.Self {
		b.o.Handler.Stream(ctx, to, e.service.Name, c)
		return
	}
	remove, ok := b.hairpins.Add(c)
	if !ok { // stopping
		pipe.Abort(c)
		return
	}
	defer remove()
	b.o.Metrics.countHairpin(false)
	server, err := b.DialServer(ctx, to, e.service.Name)
	if err != nil {
		b.log.Debug("hairpin: dial the local server", zap.String("service", e.service.Name), zap.Error(err))
		pipe.Abort(c)
		return
	}
	stop := context.AfterFunc(ctx, func() { pipe.Abort(c); pipe.Abort(server) })
	defer stop()
	pipe.Join(c, server, pipe.Options{})
}
