// Package sidecar is the composition root of one sidecar: it turns a
// configuration into running parts and wires them to each other.
//
//	s, err := sidecar.New(cfg, sidecar.Options{Log: log, Registry: reg})
//	if err != nil { ... }
//	err = s.Run(ctx) // until ctx ends
//
// Inward, a connection goes mux -> alpn -> packet or stream -> the local
// server. Outward, it goes capture -> packet or stream -> locator -> alpn. The
// parts know each other only through interfaces that are wired here.
//
// New binds everything, so that what the host refuses is told before anything
// runs. Run starts the parts and stops them in a fixed order: readiness off,
// the listener closed, streams drained, links and endpoints closed, admin last.
// Reload may be called from any goroutine while Run runs.
package sidecar

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"culvert/admin"
	"culvert/alpn"
	"culvert/capture"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/internal/sample"
	"culvert/internal/sockopt"
	"culvert/locator"
	"culvert/mux"
	"culvert/packet"
	"culvert/stream"
)

// drainTimeout is how long open streams have to end when a sidecar stops.
// memberlist suspects a member after several seconds of silence: a restart has
// to be shorter.
const drainTimeout = 5 * time.Second

// Options are what a Sidecar needs of its process.
type Options struct {
	// Log receives what happens. Nil means no log.
	Log *zap.Logger
	// Registry takes the metrics and is served on the admin address. Nil means
	// one of its own.
	Registry *prometheus.Registry
	// Version is shown in the status.
	Version string
	// Pprof serves profiles on the admin address.
	Pprof bool
}

// A Sidecar carries one server's packets and streams to and from its peers.
// Make one with [New].
type Sidecar struct {
	log     *zap.Logger
	version string

	reloading sync.Mutex // one Reload at a time
	cfg       atomic.Pointer[config.Sidecar]
	draining  atomic.Bool
	listening atomic.Bool

	certs   *certs.Source
	catalog *catalog.Catalog
	locator *locator.Locator
	table   *alpn.Table
	dialer  *alpn.Dialer

	links    *links
	receiver *packet.Receiver
	packets  *packet.Metrics
	warned   sample.Sampler
	verified verified
	outbound *stream.Outbound
	inbound  *stream.Inbound
	capture  capturer

	federated *federated // nil without a federation block

	mux   *mux.Server
	admin *admin.Server
}

// New builds a sidecar and binds its addresses. The error tells every endpoint
// that could not be bound. It is one straight line on purpose: this is where to
// read how the parts fit together.
func New(cfg *config.Sidecar, o Options) (_ *Sidecar, err error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Registry == nil {
		o.Registry = prometheus.NewRegistry()
	}
	s := &Sidecar{log: o.Log.Named("sidecar"), version: o.Version}
	s.cfg.Store(cfg)
	defer func() {
		if err != nil {
			s.close()
		}
	}()

	// Who we are, and who there is.
	s.certs, err = certs.Load(certs.Options{
		CAFile: cfg.TLS.CAFile, CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, Domain: cfg.Domain,
		Log: o.Log, Metrics: certs.NewMetrics(o.Registry),
	})
	if err != nil {
		return nil, fmt.Errorf("load certificates: %w", err)
	}
	s.catalog = catalog.New(snapshot(cfg))

	// Outward: a path, then TLS to whom the name says.
	s.table, err = alpn.NewTable(protocols(cfg.Services), otherProtocols(cfg)...)
	if err != nil {
		return nil, fmt.Errorf("build the protocol table: %w", err)
	}
	s.locator, err = locator.New(s.catalog, locator.Options{
		Control: control(cfg), Forbid: s.forbid,
		Log: o.Log, Metrics: locator.NewMetrics(o.Registry),
	})
	if err != nil {
		return nil, err
	}
	tlsMetrics := alpn.NewMetrics(o.Registry)
	s.dialer = alpn.NewDialer(s.table, s.certs, alpn.DialerOptions{Metrics: tlsMetrics})

	// Who else there is, as far as it was known before.
	if cfg.Federation != nil {
		s.federated, err = s.newFederated(cfg, o.Log, o.Registry)
		if err != nil {
			return nil, err
		}
		s.catalog.Store(s.snapshotNow(cfg))
	}

	// What is carried.
	s.packets = packet.NewMetrics(o.Registry)
	s.receiver = packet.NewReceiver(packet.ReceiverOptions{Log: o.Log, Metrics: s.packets})
	s.links = newLinks(named(cfg.Services, true), func(key linkKey, lo packet.LinkOptions) *packet.Link {
		return s.newLink(o.Log, key, lo)
	})
	streams := stream.NewMetrics(o.Registry, named(cfg.Services, false)...)
	rules := s.typeRules(cfg)
	s.outbound = stream.NewOutbound(s.dialStream, stream.OutboundOptions{
		Typed: slices.Collect(maps.Keys(rules)), Refuse: s.isGone, Alone: alone, Peers: s.present, Log: o.Log, Metrics: streams,
	})
	s.inbound = stream.NewInbound(s.dialServer, stream.InboundOptions{
		Datacenter: cfg.Datacenter, Typed: rules, Services: named(cfg.Services, false), Log: o.Log, Metrics: streams,
	})

	// Inward: what the far sidecars dial.
	muxMetrics := mux.NewMetrics(o.Registry, alpn.Reasons()...)
	plain, foreign := s.passthrough(cfg.Listen)
	terminator, err := alpn.NewServer(s.table, s.certs, alpn.ServerOptions{
		Packet: packetHandler{s}, Stream: streamHandler{s}, Session: sessionHandler{s}, Raft: s.federated.raftHandler(), HTTP: s.federated.apiHandler(),
		Foreign: foreign, Refused: muxMetrics.Refused, Log: o.Log, Metrics: tlsMetrics,
	})
	if err != nil {
		return nil, fmt.Errorf("build the TLS server: %w", err)
	}
	lc := net.ListenConfig{Control: sockopt.StreamControl, KeepAlive: -1}
	ln, err := lc.Listen(context.Background(), "tcp", cfg.Listen.Address)
	if err != nil {
		return nil, &config.ListenError{Err: err}
	}
	s.mux, err = mux.New(ln, mux.Options{
		TLS: terminator, Plain: plain, DrainTimeout: drainTimeout, Drain: s.drain,
		// All peers of other datacenters come from the gateways' addresses: a
		// limit for one of these would be a limit for all of them together.
		MaxConnsPerSource: mux.DefaultMaxConns,
		Log:               o.Log, Metrics: muxMetrics,
	})
	if err != nil {
		_ = ln.Close()
		return nil, err
	}
	s.admin, err = admin.New(admin.Options{
		Address: cfg.Admin.Address, Gatherer: o.Registry, Ready: s.readiness, Status: func() any { return s.Status() },
		Handlers: s.handlers(o.Log), Pprof: o.Pprof, Log: o.Log,
	})
	if err != nil {
		return nil, &config.ListenError{Err: err}
	}

	// The local server's side, last: from here on it is taken from it.
	captured := capture.NewMetrics(o.Registry)
	begin := func(peers []catalog.Peer) (err error) {
		s.capture, err = s.newCapture(cfg, peers, o.Log, captured)
		return err
	}
	if err := s.use(cfg, s.catalog.Load(), begin); err != nil {
		return nil, err
	}
	return s, nil
}

// close gives up what New has bound so far.
func (s *Sidecar) close() {
	if s.capture != nil {
		s.capture.Close()
	}
	if s.mux != nil {
		_ = s.mux.Close()
	}
	if s.admin != nil {
		_ = s.admin.Close()
	}
	if s.federated != nil {
		s.federated.close()
	}
}

// Addr is where the sidecar takes TLS connections.
func (s *Sidecar) Addr() net.Addr { return s.mux.Addr() }

// AdminAddr is where it answers admin requests.
func (s *Sidecar) AdminAddr() net.Addr { return s.admin.Addr() }

// Run serves until ctx ends, then drains and stops. It returns nil after a
// clean stop, and the error of the first part that ended by itself otherwise.
func (s *Sidecar) Run(ctx context.Context) error {
	cfg := s.cfg.Load()
	s.log.Info("sidecar started", zap.String("datacenter", cfg.Datacenter), zap.String("node", cfg.Node),
		zap.String("version", s.version), zap.Stringer("listen", s.Addr()), zap.Stringer("admin", s.AdminAddr()),
		zap.Int("peers", len(cfg.Peers)), zap.Strings("gateways", cfg.Gateways))

	// Four circles: the front stops first, then the links, then what they and
	// streams are carried by, then admin. What peers have sent already on a link
	// that stops still gets to the server.
	front, stopFront := context.WithCancel(ctx)
	carried, stopLinks := context.WithCancel(context.WithoutCancel(ctx))
	core, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	edge, stopEdge := context.WithCancel(context.WithoutCancel(ctx))
	defer stopFront()
	defer stopLinks()
	defer stopCore()
	defer stopEdge()

	linkParts := newParts(stopFront)
	linkParts.run("links", func() error { return s.links.run(carried) })
	coreParts := newParts(stopFront)
	coreParts.run("locator", func() error { return s.locator.Run(core) })
	coreParts.run("streams", func() error { return s.outbound.Run(core) })
	coreParts.run("capture", func() error { return s.capture.Run(core) })
	if s.federated != nil {
		coreParts.run("federation", func() error { return s.runFederation(core) })
	}
	edgeParts := newParts(stopFront)
	edgeParts.run("admin", func() error { return s.admin.Run(edge) })

	s.listening.Store(true)
	unready := context.AfterFunc(front, func() { s.draining.Store(true) })
	defer unready()
	err := s.mux.Run(front)
	stopLinks()
	err = errors.Join(err, linkParts.wait())
	stopCore()
	err = errors.Join(err, coreParts.wait())
	stopEdge()
	err = errors.Join(err, edgeParts.wait())
	s.log.Info("sidecar stopped", zap.Error(err))
	return err
}

// drain waits for the streams of the local server, which the mux does not know,
// and cuts them off when ctx ends. Peers' sessions are told to take no more. Packets go on meanwhile, both ways, on the
// connections that there are: a restart must not look like a failure, and a
// sidecar that is waiting for a stream must not either.
func (s *Sidecar) drain(ctx context.Context) {
	s.draining.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() { s.inbound.Drain(ctx) })
	for to, drain := range map[string]func(context.Context) int{"peers": s.outbound.Drain, "itself": s.capture.Drain} {
		wg.Go(func() {
			if left := drain(ctx); left > 0 {
				s.log.Info("streams of the server cut off at the end of the drain", zap.String("to", to), zap.Int("streams", left))
			}
		})
	}
	wg.Wait()
}

// parts are goroutines that each run one part. If one fails, all is stopped.
type parts struct {
	wg     sync.WaitGroup
	failed func()
	mu     sync.Mutex
	errs   []error
}

func newParts(failed func()) *parts { return &parts{failed: failed} }

func (p *parts) run(name string, part func() error) {
	p.wg.Go(func() {
		if err := part(); err != nil {
			p.mu.Lock()
			p.errs = append(p.errs, fmt.Errorf("run %s: %w", name, err))
			p.mu.Unlock()
			p.failed()
		}
	})
}

func (p *parts) wait() error {
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.errs...)
}
