package gateway

import (
	"slices"
	"strings"

	"culvert/certs"
	"culvert/config"
)

// A backendKey names one pool of addresses: one sidecar (domain and node), any
// sidecar of this datacenter (domain alone), or the gateways of another
// datacenter.
type backendKey struct {
	datacenter string
	domain     string
	node       string
}

// routes say where a server name leads. They are immutable.
type routes struct {
	datacenter string   // the gateway's own
	domains    []string // longest first, so that one inside another is found
	backends   map[backendKey][]string
}

func newRoutes(cfg *config.Gateway) *routes {
	r := &routes{
		datacenter: cfg.Datacenter,
		domains:    slices.Clone(cfg.Domains),
		backends:   make(map[backendKey][]string),
	}
	if len(r.domains) == 0 {
		r.domains = []string{cfg.Domain}
	}
	for _, s := range cfg.Sidecars {
		domain := sidecarDomain(cfg, s)
		if !slices.Contains(r.domains, domain) {
			r.domains = append(r.domains, domain)
		}
		one := backendKey{datacenter: cfg.Datacenter, domain: domain, node: s.Node}
		all := backendKey{datacenter: cfg.Datacenter, domain: domain}
		r.backends[one] = append(r.backends[one], s.Address)
		r.backends[all] = append(r.backends[all], s.Address)
	}
	for _, d := range cfg.Datacenters {
		if d.Name != cfg.Datacenter {
			r.backends[backendKey{datacenter: d.Name}] = slices.Clone(d.Gateways)
		}
	}
	slices.SortFunc(r.domains, func(a, b string) int { return len(b) - len(a) })
	return r
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
func (r *routes) addresses() []string {
	var all []string
	for _, addresses := range r.backends {
		all = append(all, addresses...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}
