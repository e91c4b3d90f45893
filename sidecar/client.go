package sidecar

import (
	"fmt"

	"go.uber.org/zap"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/internal/h2"
	"culvert/locator"
)

// NewClient returns a client of the federation that a configuration belongs to,
// with the sidecar's certificate and by its ways, and without a sidecar. Close it
// with the function returned.
func NewClient(cfg *config.Sidecar, log *zap.Logger) (_ *federation.Client, done func(), err error) {
	s := &Sidecar{log: log}
	s.cfg.Store(cfg)
	s.certs, err = certs.Load(certs.Options{CAFile: cfg.TLS.CAFile, CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, Domain: cfg.Domain})
	if err != nil {
		return nil, nil, fmt.Errorf("load certificates: %w", err)
	}
	known := state.New()
	if folder, err := federation.OpenFolder(cfg.Federation.DataDir); err == nil {
		known, _ = folder.Load() // what is known without it will do
	}
	reader := federation.NewReader(readerOptions(cfg))
	f := &federated{log: zap.NewNop(), metrics: federation.NewMetrics(nil), source: fixed{known}, reader: reader}
	next := snapshot(cfg)
	f.merge(reader, next, cfg)
	next.Join = append(next.Join, cfg.Federation.Address) // the sidecar beside which this runs
	s.catalog = catalog.New(next)
	s.locator, err = locator.New(s.catalog, locator.Options{Control: control(cfg), Forbid: f.forbid, Log: log})
	if err != nil {
		return nil, nil, err
	}
	table, err := alpn.NewTable(nil, alpn.HTTP)
	if err != nil {
		return nil, nil, err
	}
	s.dialer = alpn.NewDialer(table, s.certs, alpn.DialerOptions{})
	c := federation.NewClient(federation.ClientOptions{
		Primary: cfg.Federation.PrimaryDatacenter, Domain: cfg.Domain, Direct: cfg.Federation.PrimaryDatacenter == cfg.Datacenter,
		Transport: h2.NewTransport(s.dialAPI, h2.TransportOptions{}),
	})
	return c, c.Close, nil
}

// fixed is a state that does not change.
type fixed struct{ state *state.State }

func (f fixed) State() *state.State      { return f.state }
func (f fixed) Changed() <-chan struct{} { return nil }
