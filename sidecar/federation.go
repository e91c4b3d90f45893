package sidecar

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/h2"
)

// federated is a sidecar's part in its federation. In the primary it has the
// store, elsewhere a replica of it.
type federated struct {
	log       *zap.Logger
	metrics   *federation.Metrics
	source    federation.Source
	store     *store.Store        // nil in a secondary
	replica   *federation.Replica // nil in the primary
	client    *federation.Client
	registrar *federation.Registrar
	api       *h2.Server // nil in a secondary
	process   state.Process

	reader *federation.Reader // View is called by who holds the sidecar's reloading

	mu      sync.Mutex
	refused []federation.Refusal // by the last view
	failed  []federation.Refusal // by the host, when they were to be captured
}

// newFederated begins with what is on disk. s has its certificates, its table
// and its way of dialling by now; nothing runs yet.
func (s *Sidecar) newFederated(cfg *config.Sidecar, log *zap.Logger, reg prometheus.Registerer) (*federated, error) {
	fc := cfg.Federation
	folder, err := federation.OpenFolder(fc.DataDir)
	if err != nil {
		return nil, err
	}
	f := &federated{log: log.Named("federation"), metrics: federation.NewMetrics(reg), reader: federation.NewReader(readerOptions(cfg))}
	if f.process, err = folder.Process(); err != nil {
		return nil, err
	}
	primary := fc.PrimaryDatacenter == cfg.Datacenter
	f.client = federation.NewClient(federation.ClientOptions{
		Primary: fc.PrimaryDatacenter, Domain: cfg.Domain, Direct: primary,
		Transport: h2.NewTransport(s.dialAPI, h2.TransportOptions{}),
	})
	var registry federation.Registry = f.client
	if primary {
		f.store, err = store.Open(store.Options{
			Datacenter: cfg.Datacenter, Node: cfg.Node, Address: fc.Address, DataDir: fc.DataDir, Expect: fc.BootstrapExpect,
			Neighbours: f.client, Join: func() []string { return s.cfg.Load().Federation.RetryJoin }, Dial: s.dialRaft,
			Reap: fc.Reap, Log: log, Metrics: store.NewMetrics(reg),
		})
		if err != nil {
			return nil, err
		}
		f.source, registry = f.store, storeFirst{f.store, f.client}
		f.api = h2.NewServer(federation.NewAPI(f.store, federation.APIOptions{
			Datacenter: cfg.Datacenter, Domain: cfg.Domain, Identity: s.certs.PeerIdentity, Log: log, Metrics: f.metrics,
		}), h2.ServerOptions{Log: log})
	} else {
		f.replica = federation.NewReplica(federation.ReplicaOptions{Client: f.client, Folder: folder, Log: log, Metrics: f.metrics})
		f.source = f.replica
	}
	f.registrar = federation.NewRegistrar(federation.RegistrarOptions{
		Registry: registry, Source: f.source, Log: log, Metrics: f.metrics,
		Entry: func() *state.Registration { return entry(s.cfg.Load(), s.version, f.process) },
	})
	return f, nil
}

// storeFirst registers with the store of this process, and where that cannot take
// it, as it does not lead or its disk is full, with the one that leads.
type storeFirst struct {
	store  *store.Store
	client *federation.Client
}

func (r storeFirst) Register(ctx context.Context, reg state.Registration) (store.Lease, error) {
	lease, err := r.store.Register(ctx, reg)
	if _, refused := errors.AsType[*state.ConflictError](err); err == nil || refused || errors.Is(err, state.ErrFull) {
		return lease, err
	}
	return r.client.Register(ctx, reg)
}

// entry is what the sidecar says of itself.
func entry(cfg *config.Sidecar, version string, p state.Process) *state.Registration {
	return &state.Registration{Datacenter: cfg.Datacenter, Server: &state.Server{
		Node: cfg.Node, Advertise: cfg.Server.Advertise, Address: cfg.Federation.Address, Version: version,
		Services: registered(cfg.Services), Health: state.Passing, Process: p,
	}}
}

func registered(services []config.Service) []state.Service {
	var out []state.Service
	for _, sv := range services {
		out = append(out, state.Service{Name: sv.Name, Kind: sv.Kind, Port: sv.Port})
	}
	return out
}

// readerOptions bound what the records may do here.
func readerOptions(cfg *config.Sidecar) federation.ReaderOptions {
	o := federation.ReaderOptions{
		Datacenter: cfg.Datacenter, Node: cfg.Node, Services: registered(cfg.Services),
		Virtual: cfg.Capture == config.CaptureBind, Advertise: cfg.Server.Advertise,
	}
	if host, _, err := net.SplitHostPort(cfg.Federation.Address); err == nil {
		o.LAN, _ = netip.ParseAddr(host) // a name bounds nothing
	}
	for _, p := range cfg.Peers {
		o.Claims = append(o.Claims, federation.Claim{Datacenter: p.Datacenter, Node: p.Node, Advertise: p.Advertise})
	}
	for _, a := range cfg.Federation.Accept {
		o.Accept = append(o.Accept, federation.Accept(a))
	}
	return o
}

// otherProtocols are those that the sidecar takes and dials beside its services':
// sessions, and what the federation adds.
func otherProtocols(cfg *config.Sidecar) []string {
	out := []string{alpn.Session}
	if cfg.Federation == nil {
		return out
	}
	if cfg.Federation.PrimaryDatacenter == cfg.Datacenter {
		out = append(out, alpn.Raft)
	}
	return append(out, alpn.HTTP)
}

// dialAPI connects to a sidecar of the primary: by its name, or at an address of
// the own network.
func (s *Sidecar) dialAPI(ctx context.Context, address string) (*tls.Conn, error) {
	cfg := s.cfg.Load()
	name, id, named := federation.Named(address, cfg.Domain)
	if !named {
		c, err := s.dialSibling(ctx, address, alpn.HTTP)
		if err != nil {
			return nil, err
		}
		return c.Conn, nil
	}
	to := keyOf(id)
	raw, path, err := s.locator.Dial(ctx, to)
	if err != nil {
		return nil, err
	}
	c, err := s.dialer.DialProtocol(ctx, raw, name, alpn.HTTP)
	s.locator.Report(to, path, err)
	if err != nil {
		return nil, viaError{path, err}
	}
	return c.Conn, nil
}

// dialSibling connects to some sidecar of the own datacenter, at its address.
func (s *Sidecar) dialSibling(ctx context.Context, address, protocol string) (*alpn.Conn, error) {
	cfg := s.cfg.Load()
	d := net.Dialer{Timeout: siblingDialTimeout, Control: control(cfg)}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return s.dialer.DialProtocol(ctx, raw, certs.ServerName("", cfg.Datacenter, cfg.Domain), protocol)
}

const siblingDialTimeout = 3 * time.Second

// dialRaft connects to another member of the store, and makes sure that it is
// that one: all of them answer to the datacenter's name.
func (s *Sidecar) dialRaft(ctx context.Context, node, address string) (net.Conn, error) {
	c, err := s.dialSibling(ctx, address, alpn.Raft)
	if err != nil {
		return nil, err
	}
	if found := c.Peer(); found.Node != node {
		_ = c.Close()
		return nil, fmt.Errorf("at %s is %s, not %s", address, found, node)
	}
	return c, nil
}

// raftHandler takes connections of other members of the store.
func (f *federated) raftHandler() alpn.Handler {
	if f == nil || f.store == nil {
		return nil
	}
	return alpn.HandlerFunc(func(ctx context.Context, c *alpn.Conn) { f.store.ServeConn(ctx, c) })
}

// apiHandler takes connections of those who ask and register.
func (f *federated) apiHandler() alpn.Handler {
	if f == nil {
		return nil
	}
	return alpn.HandlerFunc(func(ctx context.Context, c *alpn.Conn) {
		if f.api == nil {
			_ = c.Close() // a secondary asks, and answers nobody
			return
		}
		f.api.ServeConn(ctx, c.Conn)
	})
}

// close gives up what was opened and never run.
func (f *federated) close() {
	if f.store != nil {
		f.store.Close()
	}
	f.client.Close()
}

// run keeps the own entry registered, and makes what the records say the
// sidecar's, until ctx ends.
func (s *Sidecar) runFederation(ctx context.Context) error {
	f := s.federated
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var failed error
	if f.store != nil {
		wg.Go(func() {
			defer stop()
			failed = f.store.Run(ctx)
		})
	} else {
		wg.Go(func() { _ = f.replica.Run(ctx) }) // nil when ctx ends
	}
	wg.Go(func() { _ = f.registrar.Run(ctx) }) // nil when ctx ends
	federation.Follow(ctx, f.source, s.takeRecords)
	wg.Wait()
	if f.api != nil {
		f.api.Close()
	}
	f.client.Close()
	return failed
}

// takeRecords makes what the records say now the sidecar's.
func (s *Sidecar) takeRecords() {
	if s.federated.store != nil { // a replica does it itself
		s.federated.metrics.Show(s.federated.store.State())
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	cfg := s.cfg.Load()
	next := s.snapshotNow(cfg)
	if s.catalog.Load().Equal(next) {
		return
	}
	if err := s.use(cfg, next, s.capture.Set); err != nil {
		s.log.Error("records cannot be taken: the old ones stay", zap.Error(err))
	}
}

// snapshotNow is all that configuration and records say.
func (s *Sidecar) snapshotNow(cfg *config.Sidecar) *catalog.Snapshot {
	next := snapshot(cfg)
	if s.federated != nil {
		s.federated.merge(s.federated.reader, next, cfg)
	}
	next.Sort()
	return next
}

// reread is snapshotNow for a configuration that is not in force yet. What it says
// of the records counts once use was called.
func (s *Sidecar) reread(cfg *config.Sidecar) (next *catalog.Snapshot, use func()) {
	next = snapshot(cfg)
	if s.federated == nil {
		return next, func() {}
	}
	reader := s.federated.reader.Reconfigured(readerOptions(cfg))
	s.federated.merge(reader, next, cfg)
	next.Sort()
	return next, func() {
		s.federated.mu.Lock()
		defer s.federated.mu.Unlock()
		s.federated.reader = reader
	}
}

// forbid keeps the records of other datacenters from making this sidecar dial
// what is not theirs.
func (s *Sidecar) forbid(to netip.AddrPort) error {
	if s.federated == nil {
		return nil
	}
	return s.federated.forbid(to)
}

func (f *federated) forbid(to netip.AddrPort) error {
	f.mu.Lock()
	reader := f.reader
	f.mu.Unlock()
	return reader.Forbid(to)
}

// merge adds what the records say to what the configuration does, which wins.
func (f *federated) merge(reader *federation.Reader, next *catalog.Snapshot, cfg *config.Sidecar) {
	view, err := reader.View(f.source.State())
	if err != nil {
		f.log.Error("records cannot be judged", zap.Error(err))
		return
	}
	f.tell(view.Refused)
	configured := make(map[catalog.Key]int, len(next.Peers))
	for i, p := range next.Peers {
		configured[p.Key] = i
	}
	for _, p := range view.Peers {
		key := catalog.Key{Datacenter: p.Datacenter, Node: p.Node}
		address := ""
		if p.Datacenter == cfg.Datacenter {
			address = p.Address // of no use to other datacenters
		}
		if i, ok := configured[key]; ok {
			if next.Peers[i].Address == "" {
				next.Peers[i].Address = address
			}
			continue
		}
		next.Peers = append(next.Peers, catalog.Peer{Key: key, Advertise: p.Advertise, Address: address, Critical: p.Critical})
	}
	next.Replicated = view.Gateways
	next.Join = cfg.Federation.RetryJoin
	f.ways(next, cfg, view)
}

// ways adds how datacenters are reached.
func (f *federated) ways(next *catalog.Snapshot, cfg *config.Sidecar, view federation.View) {
	for dc, replicated := range view.Datacenters {
		next.Datacenters = withReplicated(next.Datacenters, dc, replicated)
	}
	primary := cfg.Federation.PrimaryDatacenter
	if primary != cfg.Datacenter {
		next.Datacenters = withReplicated(next.Datacenters, primary, nil)
	}
	for i := range next.Datacenters {
		d := &next.Datacenters[i]
		if d.Mode == "" {
			d.Mode = catalog.ModeAuto
		}
		if d.Name == primary {
			d.Fallback = cfg.Federation.PrimaryGateways
		}
	}
	slices.SortFunc(next.Datacenters, func(a, b catalog.Datacenter) int { return strings.Compare(a.Name, b.Name) })
}

func union(a, b []string) []string {
	out := append([]string(nil), a...)
	have := make(map[string]bool, len(a))
	for _, one := range a {
		have[one] = true
	}
	for _, one := range b {
		if !have[one] {
			have[one] = true
			out = append(out, one)
		}
	}
	return out
}

// withReplicated gives a datacenter its replicated gateways, and adds it where it
// is not known.
func withReplicated(all []catalog.Datacenter, name string, replicated []string) []catalog.Datacenter {
	for i := range all {
		if all[i].Name == name {
			all[i].Replicated = union(all[i].Replicated, replicated)
			return all
		}
	}
	return append(all, catalog.Datacenter{Name: name, Mode: catalog.ModeAuto, Replicated: replicated})
}

// tell logs what is kept out, once as long as it stays the same.
func (f *federated) tell(refused []federation.Refusal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	federation.LogNew(f.log, f.refused, refused)
	f.refused = refused
	f.metrics.KeptOut(len(f.refused) + len(f.failed))
}

// uncaptured keeps and logs which peers of the records this host cannot capture.
func (f *federated) uncaptured(out map[catalog.Key]error) {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var failed []federation.Refusal
	for key, err := range out {
		k := state.Key{Datacenter: key.Datacenter, Kind: state.KindServer, Name: key.Node}
		failed = append(failed, federation.Refusal{Key: k, Why: err.Error()})
	}
	slices.SortFunc(failed, func(a, b federation.Refusal) int { return strings.Compare(a.String(), b.String()) })
	federation.LogNew(f.log, f.failed, failed)
	f.failed = failed
	f.metrics.KeptOut(len(f.refused) + len(f.failed))
}

// handlers are further paths of the admin address.
func (s *Sidecar) handlers(log *zap.Logger) map[string]http.Handler {
	out := map[string]http.Handler{"GET /v1/explain/{dc}/{node}": http.HandlerFunc(s.explainHandler)}
	f := s.federated
	if f == nil {
		return out
	}
	read := federation.ReadHandler(f.source, log)
	for _, path := range []string{"GET /v1/federation-states", "GET /v1/federation-states/", "GET /v1/federation-state/"} {
		out[path] = read
	}
	if f.store != nil {
		out["GET /v1/federation-peers"] = federation.PeersHandler(f.store)
	}
	return out
}

func (f *federated) status(cfg *config.Sidecar) *federation.Status {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	refused, failed := f.refused, f.failed
	f.mu.Unlock()
	st := federation.NewStatus(cfg.Datacenter, cfg.Federation.PrimaryDatacenter, f.source.State(), f.registrar.Status(), refused, failed)
	if f.store == nil {
		return st.Follows(f.replica.Status())
	}
	is := f.store.Status()
	st.Leader, st.Waiting, st.LastError = is.Leader, is.Waiting, is.Error
	return st
}
