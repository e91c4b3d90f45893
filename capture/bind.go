package capture

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/connset"
)

// DefaultMaxStreams is how many captured connections may be open at once where
// [BindOptions] says nothing.
const DefaultMaxStreams = 4096

// ErrNoEndpoint is returned by [Bind.Deliver] for a peer or service that has
// no endpoint: the catalog does not know it, or not any more.
var ErrNoEndpoint = errors.New("no endpoint for this peer and service")

// BindOptions configure a [Bind].
type BindOptions struct {
	// Self is the local server. With Hairpin its advertised address gets
	// endpoints too.
	Self catalog.Key
	// Server is the address that the local server sends from. Required.
	Server netip.Addr
	// Advertise is the local server's own advertised address. Required.
	Advertise netip.Addr
	// Hairpin answers on Advertise and hands what comes straight back to the
	// server. Where the server has the address itself, nothing is bound.
	Hairpin bool
	// Services are the ports to answer on. At least one is required.
	Services []Service
	// Handler takes what is captured. Required.
	Handler Handler
	// WrongSource is called for each packet that did not come from Server.
	// Nil means nobody wants to know.
	WrongSource func()
	// MaxStreams bounds the captured connections that are open at once; more
	// wait in the kernel. Zero means [DefaultMaxStreams].
	MaxStreams int
	// Log receives what goes wrong. Nil means no log.
	Log *zap.Logger
	// Metrics counts. Nil means no counts.
	Metrics *Metrics
}

// A Bind answers on the advertised addresses of peers. Make one with [NewBind].
type Bind struct {
	o      BindOptions
	log    *zap.Logger
	local  localAddrs
	accept *acceptor
	warned sometimes
	wg     sync.WaitGroup

	hairpins *connset.Set // connections of the server's to itself

	mu        sync.Mutex
	endpoints map[endpointKey]*endpoint
	ctx       context.Context // Run's, for endpoints that Set opens later
	closed    bool

	routes  atomic.Pointer[routes]
	loop    *loop // reads the packet endpoints
	outlets outlets
}

// A route names what Deliver is asked for.
type route struct {
	peer    catalog.Key
	service string
}

// routes is what the data path reads; it is replaced whole.
type routes struct {
	packets map[route]*endpoint
	sources map[catalog.Key]netip.Addr
}

// NewBind opens the endpoints of peers. It opens all or none: the error joins
// an [*EndpointError] for each that could not be had. A Bind that is never run
// is given up with Close.
func NewBind(peers []catalog.Peer, o BindOptions) (*Bind, error) {
	switch {
	case !o.Server.IsValid():
		return nil, errors.New("capture: Server is required")
	case !o.Advertise.IsValid():
		return nil, errors.New("capture: Advertise is required")
	case len(o.Services) == 0:
		return nil, errors.New("capture: Services is required")
	case o.Handler == nil:
		return nil, errors.New("capture: Handler is required")
	case o.MaxStreams < 0:
		return nil, fmt.Errorf("capture: MaxStreams is %d, must not be negative", o.MaxStreams)
	case o.MaxStreams == 0:
		o.MaxStreams = DefaultMaxStreams
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	b := &Bind{
		o: o, log: o.Log.Named("capture"),
		local:     localAddrs{known: []netip.Addr{o.Server, o.Advertise}},
		accept:    newAcceptor(o.Log.Named("capture"), o.MaxStreams),
		hairpins:  connset.New(),
		endpoints: make(map[endpointKey]*endpoint),
	}
	var err error
	if b.loop, err = newLoop(b.servePackets); err != nil {
		return nil, err
	}
	if err := b.Set(peers); err != nil {
		b.loop.close()
		return nil, err
	}
	return b, nil
}

// A want is an endpoint that should be open.
type want struct {
	owner   catalog.Key
	service Service
}

func (b *Bind) wanted(peers []catalog.Peer) map[endpointKey]want {
	w := make(map[endpointKey]want)
	for _, s := range b.o.Services {
		for _, p := range peers {
			w[endpointKey{netip.AddrPortFrom(p.Advertise, s.Port), s.Packet}] = want{p.Key, s}
		}
		at := netip.AddrPortFrom(b.o.Advertise, s.Port)
		if b.o.Hairpin && at != s.Local {
			w[endpointKey{at, s.Packet}] = want{b.o.Self, s}
		}
	}
	return w
}

// Set makes peers the set of those that have endpoints. Endpoints of others
// are closed, new ones are opened, and what stays is not touched: a peer that
// takes another's address takes its socket. If one endpoint cannot be opened,
// nothing changes and the error says which and why.
func (b *Bind) Set(peers []catalog.Peer) error {
	wanted := b.wanted(peers)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errors.New("capture: closed")
	}
	opened, err := b.openMissing(wanted)
	if err != nil {
		return err
	}
	for key, e := range b.endpoints {
		if w, ok := wanted[key]; ok {
			e.owner.Store(&w.owner)
			continue
		}
		e.close(b.loop)
		delete(b.endpoints, key)
	}
	for _, e := range opened {
		b.endpoints[e.key] = e
		b.start(e)
	}
	b.publish(peers)
	return nil
}

// openMissing opens what is wanted and not there. Called with mu held.
func (b *Bind) openMissing(wanted map[endpointKey]want) (opened []*endpoint, err error) {
	var faults []error
	for key, w := range wanted {
		if b.endpoints[key] != nil {
			continue
		}
		e, err := openEndpoint(key, w.service, w.owner, b.loop)
		if err != nil && w.owner == b.o.Self && errors.Is(err, syscall.EADDRINUSE) {
			b.log.Info("the server has its advertised address itself: no hairpin needed",
				zap.Stringer("address", key.addr), zap.String("service", w.service.Name))
			continue
		}
		if err != nil {
			faults = append(faults, &EndpointError{
				Peer: w.owner, Network: w.service.network(), Address: key.addr, Err: err,
				Remedy: remedy(err, w.service.network(), key.addr),
			})
			continue
		}
		opened = append(opened, e)
	}
	if faults == nil {
		return opened, nil
	}
	for _, e := range opened {
		e.close(b.loop)
	}
	return nil, errors.Join(faults...)
}

// start begins to take what comes to an endpoint, once Run has been called. Called with mu held.
func (b *Bind) start(e *endpoint) {
	if b.ctx == nil {
		return
	}
	ctx := b.ctx
	if e.udp != nil {
		b.loop.start(e)
		return
	}
	b.wg.Go(func() {
		b.accept.run(ctx, e.tcp, nil, func(c *net.TCPConn) { b.serveStream(ctx, e, c) })
	})
}

// publish replaces what the data path reads. Called with mu held.
func (b *Bind) publish(peers []catalog.Peer) {
	r := &routes{packets: make(map[route]*endpoint), sources: make(map[catalog.Key]netip.Addr)}
	for _, p := range peers {
		r.sources[p.Key] = p.Advertise
	}
	r.sources[b.o.Self] = b.o.Advertise
	for _, e := range b.endpoints {
		if e.udp != nil {
			r.packets[route{*e.owner.Load(), e.service.Name}] = e
		}
	}
	b.routes.Store(r)
	b.o.Metrics.setEndpoints(len(b.endpoints))
}

// Deliver hands packets to the local server, from the sender's advertised
// address, in their order. It does not block and does not keep them. It returns how
// many it has handed on and, if not all, why not the next one: [ErrNoEndpoint] for
// a sender without an endpoint for the service.
func (b *Bind) Deliver(from catalog.Key, service string, packets [][]byte) (n int, err error) {
	e := b.routes.Load().packets[route{from, service}]
	if e == nil {
		return 0, ErrNoEndpoint
	}
	n, err = e.udp.send(&b.outlets, packets, nil, e.server)
	if err != nil {
		return n, fmt.Errorf("write packet to the server: %w", err)
	}
	return n, nil
}

// DialServer connects to the local server for a stream of the peer's, from the
// peer's advertised address, so that the server's limits for one client address
// count each peer by itself. A peer that the catalog does not know has no such
// address: its streams come from whatever address the host chooses. The budget
// is five seconds.
func (b *Bind) DialServer(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error) {
	return dialServer(ctx, b.o.Services, service, b.routes.Load().sources[from])
}

// Run serves until ctx ends, then closes the endpoints and waits for every
// goroutine, those of [Handler.Stream] included. It returns nil.
func (b *Bind) Run(ctx context.Context) error {
	b.mu.Lock()
	if b.closed || b.ctx != nil {
		b.mu.Unlock()
		return errors.New("capture: run again or after Close")
	}
	b.ctx = ctx
	b.wg.Go(b.loop.run)
	for _, e := range b.endpoints {
		b.start(e)
	}
	b.mu.Unlock()
	<-ctx.Done()
	b.Close()
	b.wg.Wait()
	b.accept.wg.Wait()
	return nil
}

// Drain refuses new connections of the server's to itself and waits until those
// that are open have ended. It aborts what is left when ctx ends, and returns how
// many that were.
func (b *Bind) Drain(ctx context.Context) int { return b.hairpins.Drain(ctx) }

// Close closes the endpoints. After Run has been called it is Run's context
// that does so.
func (b *Bind) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, e := range b.endpoints {
		e.close(b.loop)
	}
	clear(b.endpoints)
	b.loop.close()
	b.o.Metrics.setEndpoints(0)
}

// remedy says what the operator can do about a socket that could not be bound.
func remedy(err error, network string, at netip.AddrPort) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && wildcardInUse(network, at.Port()):
		return fmt.Sprintf("a process listens on port %d of all addresses: bind the server to one address (for example -bind %s for serf, "+
			"bind_addr for consul and nomad) or let it advertise another port", at.Port(), "<server.address>")
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Sprintf("another process has %s/%s: `ss -lnp 'sport = :%d'` tells which; "+
			"it may be a second sidecar, or the server itself if this address is its own", at, network, at.Port())
	case errors.Is(err, syscall.EADDRNOTAVAIL) && at.Addr().Is4():
		return fmt.Sprintf("make the address local with `ip addr add %s/32 dev lo`, or advertise one of 127.0.0.0/8, all of which are local", at.Addr())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf("make the address local with `ip -6 route add local %s/128 dev lo` (one route for a whole prefix will do)", at.Addr())
	case errors.Is(err, syscall.EACCES):
		return fmt.Sprintf("port %d needs CAP_NET_BIND_SERVICE", at.Port())
	}
	return ""
}

// wildcardInUse reads the kernel's socket tables for one that has the port on
// all addresses (proc(5), /proc/net/tcp: local_address in hexadecimal).
func wildcardInUse(network string, port uint16) bool {
	suffix := ":" + fmt.Sprintf("%04X", port)
	for _, table := range []string{network, network + "6"} {
		f, err := os.Open("/proc/net/" + table)
		if err != nil {
			continue
		}
		found := false
		for sc := bufio.NewScanner(f); sc.Scan() && !found; {
			fields := strings.Fields(sc.Text())
			if len(fields) < 4 || !strings.HasSuffix(fields[1], suffix) {
				continue
			}
			addr := strings.TrimSuffix(fields[1], suffix)
			// 0A is TCP_LISTEN; UDP sockets that only listen are 07 (TCP_CLOSE).
			state, err := strconv.ParseUint(fields[3], 16, 8)
			found = err == nil && strings.Trim(addr, "0") == "" && (network == "udp" || state == 0x0A)
		}
		_ = f.Close()
		if found {
			return true
		}
	}
	return false
}
