// Package gateway passes TLS connections on by the server name of their
// ClientHello: to a sidecar of its own datacenter, or to the gateways of another.
// It is the composition root of `culvert gateway`.
//
//	g, err := gateway.New(cfg, gateway.Options{Log: log, Registry: registry})
//	if err != nil { ... }
//	err = g.Run(ctx)          // until ctx ends, and then the drain
//	err = g.Reload(newConfig) // meanwhile, from another goroutine
//
// A gateway holds no key, terminates nothing and changes no byte: the two ends
// authenticate each other through it. It dials what its configuration names and
// nothing else, whatever the names that strangers send, and it never passes a
// connection on to itself.
//
//	<node>.server.<own dc>.<domain>   that sidecar
//	server.<own dc>.<domain>          a healthy sidecar of the datacenter
//	anything under another known dc   a healthy gateway of that datacenter
//	anything else                     alert unrecognized_name
//
// A Gateway's methods may be called from any goroutine; Run once.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"culvert/admin"
	"culvert/config"
	"culvert/federation"
	"culvert/internal/pipe"
	"culvert/internal/resolve"
	"culvert/internal/sample"
	"culvert/internal/sockopt"
	"culvert/locator"
	"culvert/mux"
)

// The budgets of a gateway, unless Options say otherwise.
const (
	HelloTimeout = 10 * time.Second
	DialTimeout  = 10 * time.Second
	DrainTimeout = 5 * time.Second
)

// The limits on connections. They are far above those of a sidecar, since all
// that another datacenter sends comes from the one address of its gateway.
const (
	maxConns          = 16 << 10
	maxConnsPerSource = 8 << 10
	maxPending        = 1 << 10
)

// Options are what the program gives a [Gateway] beside its configuration.
type Options struct {
	// Log receives what happens. Nil means no log.
	Log *zap.Logger
	// Registry receives the metrics and feeds /metrics. Nil means one of its
	// own.
	Registry *prometheus.Registry
	// Version is shown in the status.
	Version string
	// Pprof adds profiles to the admin address.
	Pprof bool
	// HelloTimeout bounds the wait for a whole ClientHello, DialTimeout that
	// for a backend, DrainTimeout that for open streams when the gateway stops.
	// 0 means the constant of the same name.
	HelloTimeout, DialTimeout, DrainTimeout time.Duration
}

// A Gateway is one running gateway.
type Gateway struct {
	opts    Options
	log     *zap.Logger
	metrics *metrics
	mux     *mux.Server
	admin   *admin.Server
	own     *own

	resolver *resolve.Resolver
	dials    *locator.Metrics

	federated *federated // nil without a federation block

	inflight *inflight
	relays   *pipe.Relays // while Run runs
	loops    int          // of the relays
	spliced  atomic.Int64
	warned   sample.Sampler
	ready    atomic.Bool

	backends *backends
	reload   sync.Mutex // one Reload at a time
	config   atomic.Pointer[config.Gateway]
}

// New binds the listener and the admin address of a configuration. A Gateway
// that is never run is given up with Close.
func New(cfg *config.Gateway, o Options) (*Gateway, error) {
	o = o.withDefaults()
	g := &Gateway{
		opts:     o,
		log:      o.Log.Named("gateway"),
		metrics:  newMetrics(o.Registry),
		inflight: newInflight(),
		resolver: resolve.New(resolve.Options{}),
		dials:    locator.NewMetrics(o.Registry),
		loops:    runtime.GOMAXPROCS(0),
	}
	ln, err := pipe.Listen(context.Background(), cfg.Listen.Address, sockopt.StreamListener)
	if err != nil {
		return nil, &config.ListenError{Err: err}
	}
	g.own = newOwn(ln.Addr())
	g.backends = newBackends(g.newPool)
	if cfg.Federation != nil {
		g.federated, err = g.newFederated(cfg, o.Registry)
		if err != nil {
			_ = ln.Close() // nothing was accepted
			return nil, err
		}
	}
	if err := g.Reload(cfg); err != nil {
		_ = ln.Close() // nothing was accepted
		return nil, err
	}
	g.mux, err = mux.New(ln, mux.Options{
		MaxConns:          maxConns,
		MaxConnsPerSource: maxConnsPerSource,
		MaxPending:        maxPending,
		DrainTimeout:      o.DrainTimeout,
		Pass:              g.serve,
		Log:               o.Log,
		Metrics:           mux.NewMetrics(o.Registry),
	})
	if err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("serve connections: %w", err)
	}
	g.admin, err = admin.New(admin.Options{
		Address:  cfg.Admin.Address,
		Gatherer: o.Registry,
		Ready:    g.readiness,
		Status:   func() any { return g.Status() },
		Handlers: g.federated.handlers(o.Log),
		Pprof:    o.Pprof,
		Log:      o.Log,
	})
	if err != nil {
		_ = ln.Close()
		return nil, &config.ListenError{Err: err}
	}
	return g, nil
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Registry == nil {
		o.Registry = prometheus.NewRegistry()
	}
	if o.HelloTimeout == 0 {
		o.HelloTimeout = HelloTimeout
	}
	if o.DialTimeout == 0 {
		o.DialTimeout = DialTimeout
	}
	if o.DrainTimeout == 0 {
		o.DrainTimeout = DrainTimeout
	}
	return o
}

// Addr is the address that connections are taken on.
func (g *Gateway) Addr() net.Addr { return g.mux.Addr() }

// AdminAddr is the address of metrics, health and status.
func (g *Gateway) AdminAddr() net.Addr { return g.admin.Addr() }

// Reload makes cfg the configuration: routes for connections to come and the
// addresses behind them change, connections that are open stay. Where it returns
// an error nothing has changed. The listener and the admin address cannot change.
func (g *Gateway) Reload(cfg *config.Gateway) error {
	g.reload.Lock()
	defer g.reload.Unlock()
	if old := g.config.Load(); old != nil {
		if fixed := config.RestartGateway(old, cfg); len(fixed) > 0 {
			return &restartError{fixed}
		}
	}
	view, useReader, err := g.reread(cfg)
	if err != nil {
		return err
	}
	r := newRoutes(cfg, view)
	var faults []error
	for _, address := range r.addresses() {
		if err := g.own.check(address); err != nil {
			faults = append(faults, err)
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("route that leads back here: %w", err)
	}
	useReader()
	g.backends.set(r, g.metrics)
	g.config.Store(cfg)
	return nil
}

// reread reads the certificate again and judges the records by a configuration
// that is not in force yet. What it says counts once use was called.
func (g *Gateway) reread(cfg *config.Gateway) (view *federation.View, use func(), err error) {
	if g.federated == nil {
		return nil, func() {}, nil
	}
	useCertificate, err := g.federated.certs.Reload()
	if err != nil {
		return nil, nil, fmt.Errorf("reload certificates: %w", err)
	}
	reader := g.federated.reader.Reconfigured(readerOptions(cfg))
	judged, err := reader.View(g.federated.replica.State())
	if err != nil {
		return nil, nil, err
	}
	return &judged, func() {
		useCertificate()
		g.federated.use(cfg, reader, judged)
	}, nil
}

// A restartError names settings that cannot change in a running process.
type restartError struct{ settings []string }

func (e *restartError) Error() string {
	return "a reload cannot change " + strings.Join(e.settings, ", ")
}

// Hint tells what can.
func (e *restartError) Hint() string {
	return "sidecars, datacenters, and of the federation primary_gateways, retry_join and accept change live; restart the gateway for the rest"
}

func (g *Gateway) newPool() pool {
	return locator.NewPool(locator.PoolOptions{
		Resolver: g.resolver, Dial: g.dial, Forbid: g.federated.forbidder(), Log: g.opts.Log, Metrics: g.dials,
	})
}

// dial connects to a backend, but not to the gateway itself.
func (g *Gateway) dial(ctx context.Context, _, address string) (net.Conn, error) {
	if err := g.own.check(address); err != nil {
		return nil, err
	}
	return g.relays.Dial(ctx, address, sockopt.StreamSocket)
}

// Spliced is how many bytes were passed on without a copy since the start, which are
// those of bulk transfers. While Run runs it grows.
func (g *Gateway) Spliced() int64 { return g.spliced.Load() }

// Run serves until ctx ends. Then it is no longer ready, takes no more
// connections, lets open streams end for up to DrainTimeout, resets what is left
// and stops the admin listener last. It returns nil after such a stop.
//
// Packet connections do not end by themselves, so the drain does not wait for
// them; nor are they cut at its start, since their owners could not dial a single
// gateway again before it is back. They go when the last stream has gone.
func (g *Gateway) Run(ctx context.Context) error {
	var err error
	if g.relays, err = pipe.NewRelays(g.loops, &g.spliced); err != nil {
		return errors.Join(err, g.mux.Close(), g.admin.Close())
	}
	defer g.relays.Close() // when mux has seen the last connection end
	adminCtx, stopAdmin := context.WithCancel(context.WithoutCancel(ctx))
	poolCtx, stopPools := context.WithCancel(context.WithoutCancel(ctx))
	ctx, stop := context.WithCancel(ctx)
	var adminErr error
	adminDone := make(chan struct{})
	go func() {
		defer close(adminDone)
		if adminErr = g.admin.Run(adminCtx); adminErr != nil {
			stop()
		}
	}()
	g.backends.run(poolCtx)
	federationDone := make(chan struct{})
	go func() {
		defer close(federationDone)
		if g.federated != nil {
			g.runFederation(poolCtx)
		}
	}()
	g.ready.Store(true)
	unready := context.AfterFunc(ctx, func() { g.ready.Store(false) })
	defer unready()
	g.log.Info("gateway is up", zap.Stringer("address", g.Addr()), zap.Stringer("admin", g.AdminAddr()))

	muxErr := g.mux.Run(ctx)
	stop()
	stopPools()
	<-federationDone
	g.backends.wait()
	g.resolver.Close()
	stopAdmin()
	<-adminDone
	return errors.Join(muxErr, adminErr)
}
