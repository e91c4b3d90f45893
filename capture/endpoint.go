package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/iproute"
	"culvert/internal/pause"
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
	udp     *net.UDPConn    // one of udp and tcp is set
	inlet   *inlet          // reads udp
	raw     syscall.RawConn // writes to udp
	server  []byte          // where the server listens, as a sockaddr
	tcp     *net.TCPListener
}

func openEndpoint(key endpointKey, s Service, owner catalog.Key, p *batches) (*endpoint, error) {
	if key.addr.Addr().Is6() {
		if err := iproute.Local(key.addr.Addr()); err != nil {
			return nil, err
		}
	}
	e := &endpoint{key: key, service: s}
	e.owner.Store(&owner)
	var err error
	if key.packet {
		err = e.openPacket(p)
	} else {
		e.tcp, err = listenStream(key.addr)
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

func (e *endpoint) openPacket(p *batches) (err error) {
	e.udp, err = listenPacket(e.key.addr)
	if err != nil {
		return err
	}
	e.server = sockaddr(e.service.Local)
	e.raw, err = e.udp.SyscallConn()
	if err == nil {
		e.inlet, err = newInlet(e.udp, p, false)
	}
	if err != nil {
		_ = e.udp.Close()
	}
	return err
}

func (e *endpoint) close() {
	if e.udp != nil {
		_ = e.udp.Close()
		return
	}
	_ = e.tcp.Close()
}

// servePackets reads what the local server sends to the endpoint's owner until
// the socket is closed.
func (b *Bind) servePackets(ctx context.Context, e *endpoint) {
	for {
		n, err := e.inlet.next()
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
		to, out := *e.owner.Load(), handing{Handler: b.o.Handler, service: e.service.Name}
		for i := range n {
			payload, from, _ := e.inlet.at(i)
			switch {
			case from.Addr() != b.o.Server:
				b.wrongSource(e, from.Addr())
			case to == b.o.Self:
				b.o.Metrics.countHairpin(true)
				_, _ = e.udp.WriteToUDPAddrPort(payload, e.service.Local) // lost like any datagram
			default:
				out.packet(to, payload)
			}
		}
		out.flush()
	}
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
