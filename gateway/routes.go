package gateway

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"culvert/certs"
	"culvert/config"
	"culvert/federation"
	"culvert/locator"
)

// A backendKey names one pool of addresses: one sidecar (domain and node), any
// sidecar of this datacenter (domain alone), or the gateways of another
// datacenter.
type backendKey struct {
	datacenter string
	domain     string
	node       string
}

func (k backendKey) compare(o backendKey) int {
	return cmp.Or(cmp.Compare(k.datacenter, o.datacenter), cmp.Compare(k.domain, o.domain), cmp.Compare(k.node, o.node))
}

// routes say where a server name leads. They are immutable.
type routes struct {
	datacenter string   // the gateway's own
	domains    []string // longest first, so that one inside another is found
	backends   map[backendKey][]locator.Endpoint
	configured map[string]bool // addresses
}

// An origin is who says that an address serves a name.
type origin int

const (
	configured origin = iota // the operator
	sibling                  // records of the own datacenter
	foreign                  // records of another one, whose claims are bounded
)

// newRoutes makes routes of a configuration and of what the federation's records
// say, if there is one. The configuration wins: records add to it.
func newRoutes(cfg *config.Gateway, view *federation.View) *routes {
	r := &routes{
		datacenter: cfg.Datacenter,
		domains:    slices.Clone(cfg.Domains),
		backends:   make(map[backendKey][]locator.Endpoint),
		configured: make(map[string]bool),
	}
	if len(r.domains) == 0 {
		r.domains = []string{cfg.Domain}
	}
	for _, s := range cfg.Sidecars {
		domain := sidecarDomain(cfg, s)
		if !slices.Contains(r.domains, domain) {
			r.domains = append(r.domains, domain)
		}
		r.add(backendKey{cfg.Datacenter, domain, s.Node}, s.Address, configured)
		r.add(backendKey{cfg.Datacenter, domain, ""}, s.Address, configured)
	}
	for _, d := range cfg.Datacenters {
		for _, address := range d.Gateways {
			r.add(backendKey{datacenter: d.Name}, address, configured)
		}
	}
	if cfg.Federation != nil {
		r.federate(cfg, view)
	}
	slices.SortFunc(r.domains, func(a, b string) int { return len(b) - len(a) })
	return r
}

// add adds an address to a backend that does not have it.
func (r *routes) add(to backendKey, address string, from origin) {
	if from == configured {
		r.configured[address] = true
	}
	for _, e := range r.backends[to] {
		if e.Address == address {
			return // a configured one stays what it is
		}
	}
	r.backends[to] = append(r.backends[to], locator.Endpoint{Address: address, Replicated: from == foreign})
}

// federate adds what the federation block names and what the records say.
func (r *routes) federate(cfg *config.Gateway, view *federation.View) {
	f := cfg.Federation
	for _, address := range f.RetryJoin { // whichever of them answers knows the store
		r.add(backendKey{datacenter: cfg.Datacenter, domain: cfg.Domain}, address, configured)
	}
	if f.PrimaryDatacenter != cfg.Datacenter {
		for _, address := range f.PrimaryGateways {
			r.add(backendKey{datacenter: f.PrimaryDatacenter}, address, configured)
		}
	}
	for _, p := range view.Peers {
		if p.Datacenter != cfg.Datacenter {
			continue
		}
		one := backendKey{cfg.Datacenter, cfg.Domain, p.Node}
		if len(r.backends[one]) > 0 {
			continue // the configuration says where it is
		}
		r.add(one, p.Address, sibling)
		r.add(backendKey{cfg.Datacenter, cfg.Domain, ""}, p.Address, sibling)
	}
	for dc, addresses := range view.Datacenters {
		for _, address := range addresses {
			r.add(backendKey{datacenter: dc}, address, foreign)
		}
	}
}

// sidecarDomain is the domain that a sidecar's names end in.
func sidecarDomain(cfg *config.Gateway, s config.GatewaySidecar) string {
	if s.Domain != "" {
		return s.Domain
	}
	return cfg.Domain
}

// find returns the backend that a server name leads to. The name is a
// stranger's; what comes back is always a key of backends.
func (r *routes) find(serverName string) (backendKey, bool) {
	name := strings.ToLower(serverName)
	for _, domain := range r.domains {
		rest, ok := strings.CutSuffix(name, "."+domain)
		if !ok {
			continue
		}
		key := backendKey{datacenter: rest[strings.LastIndexByte(rest, '.')+1:]}
		if key.datacenter == r.datacenter {
			id, err := certs.ParseName(name, domain)
			if err != nil || id.Role != certs.RoleServer {
				return backendKey{}, false
			}
			key.domain, key.node = domain, id.Node
		} else if rest == key.datacenter {
			return backendKey{}, false // a datacenter's bare name is nobody's
		}
		_, known := r.backends[key]
		return key, known
	}
	return backendKey{}, false
}

// addresses returns every configured address once, in order.
func (r *routes) addresses() []string { return slices.Sorted(maps.Keys(r.configured)) }
