package capture

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"culvert/capture/ruleset"
	"culvert/catalog"
	"culvert/internal/iproute"
)

// RedirectOptions configure a [Redirect].
type RedirectOptions struct {
	// Self is the local server. Its siblings, the servers of its datacenter, are
	// reached as they are and not captured.
	Self catalog.Key
	// Server is the address of this host that the local server sends from.
	// Required, and neither loopback nor wildcard.
	Server netip.Addr
	// Listen is the port that the sidecar listens on; it names the table.
	// Required.
	Listen uint16
	// Services are the ports to capture. At least one is required.
	Services []Service
	// Open takes the rules away at a clean stop, and lets what was for a peer
	// that left go its plain way. Otherwise both are refused.
	Open bool
	// Handler takes what is captured. Required.
	Handler Handler
	// MaxStreams bounds the captured connections that are open at once; more
	// wait in the kernel. Zero means [DefaultMaxStreams].
	MaxStreams int
	// Log receives what goes wrong. Nil means no log.
	Log *zap.Logger
	// Metrics counts. Nil means no counts.
	Metrics *Metrics
}

func (o RedirectOptions) withDefaults() (RedirectOptions, error) {
	switch {
	case !o.Server.IsValid():
		return o, errors.New("capture: Server is required")
	case o.Listen == 0:
		return o, errors.New("capture: Listen is required")
	case len(o.Services) == 0:
		return o, errors.New("capture: Services is required")
	case o.Handler == nil:
		return o, errors.New("capture: Handler is required")
	case o.MaxStreams < 0:
		return o, fmt.Errorf("capture: MaxStreams is %d, must not be negative", o.MaxStreams)
	case o.MaxStreams == 0:
		o.MaxStreams = DefaultMaxStreams
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return o, nil
}

// A Redirect takes what an unchanged server sends to its peers' real addresses,
// by rules in the kernel (package ruleset). Make one with [NewRedirect].
//
// It has a socket or two for each service, whatever the number of peers: each peer has
// an endpoint, an address of its own in a range that is local to this host, to
// which the rules turn what is sent to it.
type Redirect struct {
	o      RedirectOptions
	log    *zap.Logger
	table  *ruleset.Table
	lock   *ruleset.Lock
	accept *acceptor
	wg     sync.WaitGroup
	local  localAddrs
	warned sometimes

	sockets []*redirectSocket
	routes  atomic.Pointer[redirectRoutes] // what the data path reads; replaced whole
	probed  *prober
	batches batches
	outlets outlets

	mu         sync.Mutex
	state      ruleset.State // what the kernel should hold
	generation int           // of state
	trouble    string        // why the kernel does not hold it
	ran        bool
	closed     bool
}

// A redirectSocket is where one service of all peers is taken.
type redirectSocket struct {
	service Service
	port    uint16
	udp     *net.UDPConn // one of udp and tcp is set
	inlet   *inlet       // reads udp
	voice   *voice       // beside udp: hands the server what peers send
	server  []byte       // where the server listens, as a sockaddr
	tcp     *net.TCPListener
}

type redirectRoutes struct {
	owners    map[netip.Addr]catalog.Key // by endpoint
	endpoints map[catalog.Key]redirectEndpoint
}

type redirectEndpoint struct {
	addr    netip.Addr
	control []byte // makes a datagram come from the peer's advertised address
}

// NewRedirect opens the sockets and installs the rules for peers, all or nothing.
// What a sidecar before it refused stays refused. From then on what the server
// sends waits for Run. A Redirect that is never run is given up with Close.
//
// The error tells what is missing: a privilege ([ruleset.ErrPermission]), a part
// of the kernel ([ruleset.ErrUnsupported]), or for which peers it cannot work, by
// a [*PeerError] each.
func NewRedirect(peers []catalog.Peer, o RedirectOptions) (_ *Redirect, err error) {
	o, err = o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := checkServer(o.Server); err != nil {
		return nil, err
	}
	r := &Redirect{o: o, log: o.Log.Named("capture"), accept: newAcceptor(o.Log.Named("capture"), o.MaxStreams), local: localAddrs{known: []netip.Addr{o.Server}}, probed: newProber()}
	r.lock, err = ruleset.Hold(o.Listen)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.giveUp()
		}
	}()
	if err := r.checkOthers(); err != nil {
		return nil, err
	}
	if err := r.openSockets(); err != nil {
		return nil, err
	}
	spec := ruleset.Spec{Listen: o.Listen, V6: o.Server.Is6()}
	for _, s := range r.sockets {
		port := ruleset.Port{Packet: s.service.Packet, Service: s.service.Port, Endpoint: s.port}
		if s.voice != nil {
			port.Voice = s.voice.port
		}
		spec.Ports = append(spec.Ports, port)
	}
	r.table = ruleset.New(spec)
	left, err := r.table.Read()
	if err != nil && !errors.Is(err, ruleset.ErrNoTable) && !errors.Is(err, ruleset.ErrDamaged) {
		return nil, err
	}
	next, err := r.plan(peers, left)
	if err != nil {
		return nil, err
	}
	if err := r.table.Replace(next); err != nil {
		return nil, err
	}
	r.use(next, peers)
	return r, nil
}

// checkServer tells why no server can be captured at an address.
func checkServer(a netip.Addr) error {
	problem := ""
	switch {
	case a.IsLoopback(), a.IsUnspecified():
		problem = "is no address that peers could know"
	case iproute.Local(a) != nil:
		problem = "is not an address of this host"
	}
	if problem == "" {
		return nil
	}
	return &hinted{
		fmt.Errorf("server.address %s %s", a, problem),
		"give the address that the server sends to its peers from: `ip -brief addr` lists this host's",
	}
}

// checkOthers tells whether another sidecar's table takes one of the ports: rules
// tell servers apart by their ports, not by their addresses.
func (r *Redirect) checkOthers() error {
	tables, err := ruleset.Tables()
	if err != nil {
		return err
	}
	for _, port := range tables {
		t, err := ruleset.Find(port)
		if errors.Is(err, ruleset.ErrNoTable) || err == nil && (port == r.o.Listen || t.V6() != r.o.Server.Is6()) {
			continue
		}
		if err != nil {
			return err
		}
		taken, err := t.Services()
		if err != nil {
			return err
		}
		for _, s := range r.o.Services {
			if slices.Contains(taken, ruleset.Port{Packet: s.Packet, Service: s.Port}) {
				return &hinted{
					fmt.Errorf("service %q (%s port %d) is captured by table %s already", s.Name, s.network(), s.Port, t.Name()),
					"one server of a host can be captured for a port; if that table is of a sidecar that is none any more, `culvert capture clear --table " + t.Name() + "`",
				}
			}
		}
	}
	return nil
}

// hinted is an error with a remedy.
type hinted struct {
	error
	hint string
}

func (e *hinted) Hint() string  { return e.hint }
func (e *hinted) Unwrap() error { return e.error }

// openSockets binds a socket for each service, on a port beside the service's.
// They are on all addresses, since endpoints are many and change; that nothing
// reaches them from outside is seen to by the rules, and looked at again when
// something comes. Binding them to the loopback interface would do for IPv4 alone:
// IPv6 finds no way from there to an address of another interface.
func (r *Redirect) openSockets() error {
	taken := make(map[uint16]bool)
	for _, s := range r.o.Services {
		taken[s.Port], taken[s.Local.Port()] = true, true
	}
	for _, s := range r.o.Services {
		var err error
		for _, port := range endpointPorts(s.Port, taken) {
			at := netip.AddrPortFrom(netip.IPv4Unspecified(), port)
			if r.o.Server.Is6() {
				at = netip.AddrPortFrom(netip.IPv6Unspecified(), port)
			}
			socket := &redirectSocket{service: s, port: port}
			if s.Packet {
				err = socket.openPacket(at, taken, &r.batches)
			} else {
				socket.tcp, err = listenStream(at)
			}
			if err == nil {
				r.sockets = append(r.sockets, socket)
				break
			}
			if !errors.Is(err, syscall.EADDRINUSE) {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("open the endpoint of service %q (%s): %w", s.Name, s.network(), err)
		}
	}
	return nil
}

// openPacket opens the two sockets of a packet service: one to take what the
// server sends, one to hand it what peers do.
func (s *redirectSocket) openPacket(at netip.AddrPort, taken map[uint16]bool, p *batches) (err error) {
	s.voice, err = openVoice(at.Addr().Is6(), taken)
	if err != nil {
		return err
	}
	s.server = sockaddr(s.service.Local)
	s.udp, s.inlet, err = listenPacketAny(at, p)
	if err != nil {
		s.voice.close()
	}
	return err
}

// endpointPorts are the ports to try for a service's endpoint: 10000 further on,
// where that is free and not the server's own.
func endpointPorts(service uint16, taken map[uint16]bool) []uint16 {
	const shift, tries, lowest, all = 10000, 6, 1024, 1<<16 - 1024
	ports := make([]uint16, 0, tries)
	for i := 1; i <= tries; i++ {
		if p := uint16((int(service)+all-lowest+i*shift)%all + lowest); !taken[p] {
			ports = append(ports, p)
		}
	}
	return ports
}

// Set makes peers the set of those that are captured, in one transaction. What
// stays is not touched. One that left is refused from now on, or with Open let go.
// If one cannot be captured nothing changes, and the error says which and why.
func (r *Redirect) Set(peers []catalog.Peer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("capture: closed")
	}
	next, err := r.plan(peers, r.state)
	if err != nil {
		return err
	}
	if err := r.table.Change(r.state, next); err != nil {
		// Somebody has changed the table since it was looked at.
		r.log.Warn("the table cannot be changed as it should be: it is made anew", zap.String("table", r.table.Name()), zap.Error(err))
		if err := r.table.Replace(next); err != nil {
			return err
		}
	}
	r.use(next, peers)
	return nil
}

// use makes a state that the kernel holds the one that the data path knows.
// Called with mu held, or before anybody else knows r.
func (r *Redirect) use(s ruleset.State, peers []catalog.Peer) {
	routes := &redirectRoutes{owners: make(map[netip.Addr]catalog.Key), endpoints: make(map[catalog.Key]redirectEndpoint)}
	for _, p := range peers {
		e, ok := s.Peers[p.Advertise]
		if !ok || p.Datacenter == r.o.Self.Datacenter {
			continue
		}
		routes.owners[e.Endpoint] = p.Key
		routes.endpoints[p.Key] = redirectEndpoint{e.Endpoint, sourceControl(p.Advertise)}
	}
	r.state = s
	r.generation++
	r.routes.Store(routes)
	r.o.Metrics.setEndpoints(len(s.Peers))
	r.o.Metrics.setLost(len(s.Lost))
}

// Deliver hands packets to the local server, from the sender's advertised address;
// the rules make their port the service's. Otherwise it is as [Bind.Deliver]; it
// returns [ErrNoEndpoint] for a sender that is not captured.
func (r *Redirect) Deliver(from catalog.Key, service string, packets [][]byte) (int, error) {
	e, ok := r.routes.Load().endpoints[from]
	if !ok {
		return 0, ErrNoEndpoint
	}
	for _, s := range r.sockets {
		if s.udp == nil || s.service.Name != service {
			continue
		}
		n, err := s.voice.send(&r.outlets, packets, e.control, s.server)
		if err != nil {
			return n, fmt.Errorf("write packet to the server: %w", err)
		}
		return n, nil
	}
	return 0, ErrNoEndpoint
}

// DialServer connects to the local server for a stream of the peer's, from the
// peer's endpoint, so that the server's limits for one client address count each
// peer by itself. A peer that is not captured has no such address: its streams
// come from whatever address the host chooses. The budget is five seconds.
func (r *Redirect) DialServer(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error) {
	return dialServer(ctx, r.o.Services, service, r.routes.Load().endpoints[from].addr)
}

// Drain returns at once: the server's connections to itself are not captured.
func (*Redirect) Drain(context.Context) int { return 0 }

// MarkOwn lets a connection of the sidecar's own pass the rules of redirect.
func MarkOwn(c syscall.RawConn) error {
	err := setsockopt(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, ruleset.Mark) })
	if err != nil {
		return fmt.Errorf("mark the connection: %w", err)
	}
	return nil
}

// Run serves until ctx ends, and waits for every goroutine, those of
// [Handler.Stream] included. It watches over the rules meanwhile. Then what the
// server sends is refused, or with Open leaves as before. It returns nil.
func (r *Redirect) Run(ctx context.Context) error {
	r.mu.Lock()
	if r.closed || r.ran {
		r.mu.Unlock()
		return errors.New("capture: run again or after Close")
	}
	r.ran = true
	r.mu.Unlock()
	for _, s := range r.sockets {
		if s.udp != nil {
			r.wg.Go(func() { r.servePackets(ctx, s) })
			continue
		}
		r.wg.Go(func() {
			r.accept.run(ctx, s.tcp, r.takeProbe, func(c *net.TCPConn) { r.serveStream(ctx, s, c) })
		})
	}
	r.guard(ctx)
	r.Close()
	r.wg.Wait()
	r.accept.wg.Wait()
	return nil
}

// Close gives everything up as a clean stop does. After Run has been called it
// is Run's context that does so.
func (r *Redirect) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.closed = true
	if r.o.Open {
		if err := r.table.Delete(); err != nil {
			r.log.Error("take the rules away", zap.String("table", r.table.Name()), zap.Error(err))
		}
	}
	r.giveUp()
}

// giveUp closes the sockets and leaves the table to others.
func (r *Redirect) giveUp() {
	for _, s := range r.sockets {
		if s.udp != nil {
			_ = s.udp.Close()
			s.voice.close()
		} else {
			_ = s.tcp.Close()
		}
	}
	r.lock.Release()
	r.o.Metrics.setEndpoints(0)
}

// RedirectStatus is a [Redirect] at one moment.
type RedirectStatus struct {
	Table     string                     // in the kernel
	Endpoints map[catalog.Key]netip.Addr // of the captured peers
	Lost      map[netip.Addr]string      // refused; the names are those of the peers that had the addresses
	Blocked   string                     // what keeps the server and its endpoints apart: the host's firewall, or the lack of rules; "" for nothing
}

// Status returns what is captured.
func (r *Redirect) Status() RedirectStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	st := RedirectStatus{
		Table: r.table.Name(), Lost: maps.Clone(r.state.Lost), Blocked: cmp.Or(r.trouble, r.probed.result()),
		Endpoints: make(map[catalog.Key]netip.Addr),
	}
	for key, e := range r.routes.Load().endpoints {
		st.Endpoints[key] = e.addr
	}
	return st
}

// LostAddrs are the addresses that are refused, in order.
func (s RedirectStatus) LostAddrs() []netip.Addr {
	return slices.SortedFunc(maps.Keys(s.Lost), netip.Addr.Compare)
}
