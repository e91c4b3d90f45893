package gateway

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"culvert/admin"
	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/internal/h2"
	"culvert/locator"
)

// federated is a gateway's part in its federation: it registers itself, follows
// the records, and takes its routes from them. It has a certificate for that
// alone: what passes through stays closed to it.
type federated struct {
	log       *zap.Logger
	metrics   *federation.Metrics
	certs     *certs.Source
	dialer    *alpn.Dialer
	catalog   *catalog.Catalog // the ways to the primary
	locator   *locator.Locator
	client    *federation.Client
	replica   *federation.Replica
	registrar *federation.Registrar
	domain    string

	mu     sync.Mutex
	reader *federation.Reader // View is called by who holds the gateway's reload
	view   federation.View
}

// newFederated begins with what is on disk. Nothing runs yet.
func (g *Gateway) newFederated(cfg *config.Gateway, reg prometheus.Registerer) (*federated, error) {
	fc, log := cfg.Federation, g.opts.Log
	folder, err := federation.OpenFolder(fc.DataDir)
	if err != nil {
		return nil, err
	}
	f := &federated{
		log: log.Named("federation"), metrics: federation.NewMetrics(reg), domain: cfg.Domain,
		reader: federation.NewReader(readerOptions(cfg)),
	}
	f.certs, err = certs.Load(certs.Options{
		CAFile: cfg.TLS.CAFile, CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, Domain: cfg.Domain,
		Log: log, Metrics: certs.NewMetrics(reg),
	})
	if err != nil {
		return nil, fmt.Errorf("load certificates: %w", err)
	}
	table, err := alpn.NewTable(nil, alpn.HTTP)
	if err != nil {
		return nil, fmt.Errorf("build the protocol table: %w", err)
	}
	f.dialer = alpn.NewDialer(table, f.certs, alpn.DialerOptions{Log: log, Metrics: alpn.NewMetrics(reg)})
	process, err := folder.Process()
	if err != nil {
		return nil, err
	}
	f.client = federation.NewClient(federation.ClientOptions{
		Primary: fc.PrimaryDatacenter, Domain: cfg.Domain, Direct: fc.PrimaryDatacenter == cfg.Datacenter,
		Transport: h2.NewTransport(f.dialAPI, h2.TransportOptions{}),
	})
	f.replica = federation.NewReplica(federation.ReplicaOptions{Client: f.client, Folder: folder, Log: log, Metrics: f.metrics})
	f.catalog = catalog.New(f.ways(cfg))
	f.locator, err = locator.New(f.catalog, locator.Options{
		Resolver: g.resolver, Control: g.own.control, Forbid: f.forbid, Log: log, Metrics: g.dials,
	})
	if err != nil {
		return nil, err
	}
	entry := &state.Registration{Datacenter: cfg.Datacenter, Gateway: &state.Gateway{
		Name: cfg.Node, Address: fc.Address, WANAddress: fc.WANAddress, Version: g.opts.Version, Health: state.Passing, Process: process,
	}}
	f.registrar = federation.NewRegistrar(federation.RegistrarOptions{
		Registry: f.client, Source: f.replica, Log: log, Metrics: f.metrics,
		Entry: func() *state.Registration { return entry },
	})
	return f, nil
}

// readerOptions bound what the records may do here.
func readerOptions(cfg *config.Gateway) federation.ReaderOptions {
	o := federation.ReaderOptions{Datacenter: cfg.Datacenter}
	if host, _, err := net.SplitHostPort(cfg.Federation.Address); err == nil {
		o.LAN, _ = netip.ParseAddr(host) // a name bounds nothing
	}
	for _, a := range cfg.Federation.Accept {
		o.Accept = append(o.Accept, federation.Accept(a))
	}
	return o
}

// forbid is asked from any goroutine, while a reload may change the reader.
func (f *federated) forbid(to netip.AddrPort) error {
	f.mu.Lock()
	reader := f.reader
	f.mu.Unlock()
	return reader.Forbid(to)
}

// ways are the ways to the primary: in its own datacenter any sidecar, elsewhere
// the gateways of the primary.
func (f *federated) ways(cfg *config.Gateway) *catalog.Snapshot {
	fc := cfg.Federation
	s := &catalog.Snapshot{Self: catalog.Key{Datacenter: cfg.Datacenter}}
	if fc.PrimaryDatacenter == cfg.Datacenter {
		s.Join = slices.Clone(fc.RetryJoin)
		for _, sc := range cfg.Sidecars {
			if sidecarDomain(cfg, sc) == cfg.Domain {
				s.Join = append(s.Join, sc.Address)
			}
		}
		for _, p := range f.view.Peers {
			if p.Datacenter == cfg.Datacenter {
				s.Join = append(s.Join, p.Address)
			}
		}
		slices.Sort(s.Join)
		s.Join = slices.Compact(s.Join)
		return s
	}
	primary := catalog.Datacenter{
		Name: fc.PrimaryDatacenter, Mode: catalog.ModeAuto,
		Replicated: f.view.Datacenters[fc.PrimaryDatacenter], Fallback: fc.PrimaryGateways,
	}
	for _, d := range cfg.Datacenters {
		if d.Name == primary.Name {
			primary.Gateways = d.Gateways
		}
	}
	s.Datacenters = []catalog.Datacenter{primary}
	return s
}

// dialAPI connects to a sidecar of the primary: by its name, or at an address of
// the own network.
func (f *federated) dialAPI(ctx context.Context, address string) (*tls.Conn, error) {
	name, id, named := federation.Named(address, f.domain)
	if !named {
		return f.dialSibling(ctx, address)
	}
	to := catalog.Key{Datacenter: id.Datacenter, Node: id.Node}
	raw, path, err := f.locator.Dial(ctx, to)
	if err != nil {
		return nil, err
	}
	c, err := f.dialer.DialProtocol(ctx, raw, name, alpn.HTTP)
	f.locator.Report(to, path, err)
	if err != nil {
		return nil, fmt.Errorf("at %s: %w", path.Address, err)
	}
	return c.Conn, nil
}

func (f *federated) dialSibling(ctx context.Context, address string) (*tls.Conn, error) {
	d := net.Dialer{Timeout: siblingDialTimeout}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c, err := f.dialer.DialProtocol(ctx, raw, certs.ServerName("", f.catalog.Load().Self.Datacenter, f.domain), alpn.HTTP)
	if err != nil {
		return nil, err
	}
	return c.Conn, nil
}

const siblingDialTimeout = 3 * time.Second

// forbidder is forbid, nil without a federation.
func (f *federated) forbidder() func(netip.AddrPort) error {
	if f == nil {
		return nil
	}
	return f.forbid
}

// use makes a reader, and what it has made of the records, those in force. What
// is kept out is logged once as long as it stays the same.
func (f *federated) use(cfg *config.Gateway, reader *federation.Reader, view federation.View) {
	f.mu.Lock()
	defer f.mu.Unlock()
	federation.LogNew(f.log, f.view.Refused, view.Refused)
	f.reader, f.view = reader, view
	f.metrics.KeptOut(len(view.Refused))
	if next := f.ways(cfg); !f.catalog.Load().Equal(next) {
		f.catalog.Store(next)
	}
}

// runFederation keeps the gateway registered and its routes those of the records
// until ctx ends.
func (g *Gateway) runFederation(ctx context.Context) {
	f := g.federated
	var wg sync.WaitGroup
	wg.Go(func() { _ = f.locator.Run(ctx) })   // nil when ctx ends
	wg.Go(func() { _ = f.replica.Run(ctx) })   // nil when ctx ends
	wg.Go(func() { _ = f.registrar.Run(ctx) }) // nil when ctx ends
	federation.Follow(ctx, f.replica, g.takeRecords)
	wg.Wait()
	f.client.Close()
}

// takeRecords makes the routes those of the records.
func (g *Gateway) takeRecords() {
	g.reload.Lock()
	defer g.reload.Unlock()
	cfg := g.config.Load()
	reader := g.federated.reader
	view, err := reader.View(g.federated.replica.State())
	if err != nil {
		g.log.Error("records cannot be judged: the old routes stay", zap.Error(err))
		return
	}
	g.federated.use(cfg, reader, view)
	g.backends.set(newRoutes(cfg, &view), g.metrics)
}

// loaded tells whether the records were seen once.
func (f *federated) loaded() admin.Check {
	c := admin.Check{Name: "routes", OK: f.replica.State().Index() > 0}
	if !c.OK {
		c.Detail = "the federation's records have not been read yet: " + f.replica.Status().LastError
	}
	return c
}

// handlers are what the federation adds to the admin address.
func (f *federated) handlers(log *zap.Logger) map[string]http.Handler {
	if f == nil {
		return nil
	}
	read := federation.ReadHandler(f.replica, log)
	return map[string]http.Handler{"GET /v1/federation-states": read, "GET /v1/federation-states/": read, "GET /v1/federation-state/": read}
}

func (f *federated) status(cfg *config.Gateway) *federation.Status {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	refused := f.view.Refused
	f.mu.Unlock()
	return federation.NewStatus(cfg.Datacenter, cfg.Federation.PrimaryDatacenter, f.replica.State(), f.registrar.Status(), refused).
		Follows(f.replica.Status())
}
