package gateway

import (
	"maps"
	"slices"

	"culvert/admin"
	"culvert/federation"
)

// Status is the answer of GET /v1/status.
type Status struct {
	Kind       string          `json:"kind"` // "gateway"
	Datacenter string          `json:"datacenter"`
	Node       string          `json:"node"`
	Version    string          `json:"version"`
	Ready      bool            `json:"ready"`
	Sidecars   []SidecarStatus `json:"sidecars"`
	Gateways   []RemoteStatus  `json:"gateways"`
	// Federation is nil without a federation block.
	Federation *federation.Status `json:"federation,omitempty"`
}

// SidecarStatus is one sidecar of the gateway's datacenter.
type SidecarStatus struct {
	Node      string `json:"node"`
	Domain    string `json:"domain"`
	Address   string `json:"address"`
	Healthy   bool   `json:"healthy"`
	Open      int    `json:"open"` // connections
	LastError string `json:"last_error"`
	// Replicated says that it is known from the federation's records.
	Replicated bool `json:"replicated"`
}

// RemoteStatus is one gateway of another datacenter.
type RemoteStatus struct {
	Address    string `json:"address"`
	Datacenter string `json:"datacenter"`
	Healthy    bool   `json:"healthy"`
	Open       int    `json:"open"` // connections
	LastError  string `json:"last_error"`
	// Replicated says that it is known from the federation's records.
	Replicated bool `json:"replicated"`
}

// Status tells what the gateway is doing. It does not block.
func (g *Gateway) Status() Status {
	cfg, now := g.config.Load(), g.backends.current.Load()
	s := Status{
		Kind: "gateway", Datacenter: cfg.Datacenter, Node: cfg.Node, Version: g.opts.Version, Ready: g.ready.Load(),
		Sidecars: []SidecarStatus{}, Gateways: []RemoteStatus{}, Federation: g.federated.status(cfg),
	}
	for _, key := range slices.SortedFunc(maps.Keys(now.backends), backendKey.compare) {
		to := now.backends[key]
		switch {
		case key.datacenter == cfg.Datacenter && key.node != "":
			all := now.backends[backendKey{key.datacenter, key.domain, ""}]
			for _, e := range to.pool.Status() {
				s.Sidecars = append(s.Sidecars, SidecarStatus{
					Node: key.node, Domain: key.domain, Address: e.Endpoint, Healthy: e.Healthy,
					Open: to.openTo(e.Endpoint) + all.openTo(e.Endpoint), LastError: e.LastError, Replicated: !now.routes.configured[e.Endpoint],
				})
			}
		case key.datacenter != cfg.Datacenter:
			for _, e := range to.pool.Status() {
				s.Gateways = append(s.Gateways, RemoteStatus{
					Address: e.Endpoint, Datacenter: key.datacenter, Healthy: e.Healthy, Open: to.openTo(e.Endpoint),
					LastError: e.LastError, Replicated: !now.routes.configured[e.Endpoint],
				})
			}
		}
	}
	return s
}

func (g *Gateway) readiness() admin.Readiness {
	s := g.Status()
	checks := []admin.Check{{Name: "listener", OK: s.Ready}}
	// A gateway of the primary has the way that everybody needs at first.
	if cfg := g.config.Load(); g.federated != nil && cfg.Federation.PrimaryDatacenter != cfg.Datacenter {
		checks = append(checks, g.federated.loaded())
	}
	r := admin.All(checks...)
	r.Details = map[string]any{"sidecars": s.Sidecars, "gateways": s.Gateways}
	return r
}
