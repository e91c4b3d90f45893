package gateway

import (
	"culvert/admin"
	"culvert/locator"
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
}

// SidecarStatus is one sidecar of the gateway's datacenter.
type SidecarStatus struct {
	Node      string `json:"node"`
	Domain    string `json:"domain"`
	Address   string `json:"address"`
	Healthy   bool   `json:"healthy"`
	Open      int    `json:"open"` // connections
	LastError string `json:"last_error"`
}

// RemoteStatus is one gateway of another datacenter.
type RemoteStatus struct {
	Address    string `json:"address"`
	Datacenter string `json:"datacenter"`
	Healthy    bool   `json:"healthy"`
	Open       int    `json:"open"` // connections
	LastError  string `json:"last_error"`
}

// Status tells what the gateway is doing. It does not block.
func (g *Gateway) Status() Status {
	cfg, now := g.config.Load(), g.backends.current.Load()
	s := Status{
		Kind: "gateway", Datacenter: cfg.Datacenter, Node: cfg.Node, Version: g.opts.Version, Ready: g.ready.Load(),
		Sidecars: []SidecarStatus{}, Gateways: []RemoteStatus{},
	}
	for _, c := range cfg.Sidecars {
		domain := sidecarDomain(cfg, c)
		one := now.backends[backendKey{cfg.Datacenter, domain, c.Node}]
		all := now.backends[backendKey{cfg.Datacenter, domain, ""}]
		if one == nil || all == nil {
			continue // a Reload is under way
		}
		e := endpoint(one.pool, c.Address)
		s.Sidecars = append(s.Sidecars, SidecarStatus{
			Node: c.Node, Domain: domain, Address: c.Address, Healthy: e.Healthy,
			Open: one.openTo(c.Address) + all.openTo(c.Address), LastError: e.LastError,
		})
	}
	for _, d := range cfg.Datacenters {
		to := now.backends[backendKey{datacenter: d.Name}]
		if to == nil {
			continue
		}
		for _, address := range d.Gateways {
			e := endpoint(to.pool, address)
			s.Gateways = append(s.Gateways, RemoteStatus{
				Address: address, Datacenter: d.Name, Healthy: e.Healthy, Open: to.openTo(address), LastError: e.LastError,
			})
		}
	}
	return s
}

// endpoint finds what a pool knows of an address.
func endpoint(p pool, address string) locator.EndpointStatus {
	for _, e := range p.Status() {
		if e.Endpoint == address {
			return e
		}
	}
	return locator.EndpointStatus{}
}

func (g *Gateway) readiness() admin.Readiness {
	s := g.Status()
	r := admin.All(admin.Check{Name: "listener", OK: s.Ready})
	r.Details = map[string]any{"sidecars": s.Sidecars, "gateways": s.Gateways}
	return r
}
