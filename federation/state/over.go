package state

import (
	"net/netip"
	"slices"
)

// Over returns the state with what only an older one has added, whose store is no
// more: its owners have not registered again yet. It belongs to no store, as
// there is none that has all of it.
func (s *State) Over(old *State) *State {
	next := s.next(s.index)
	next.store = ""
	for _, was := range old.Records() {
		if next.entry(was.Datacenter) == nil && len(next.entries) >= MaxDatacenters {
			continue
		}
		r := next.edit(was.Datacenter)
		if next.entry(was.Datacenter) == nil {
			r.UpdatedAt = was.UpdatedAt
		}
		for _, sv := range was.Servers {
			if i, ok := r.server(sv.Node); !ok {
				r.Servers = slices.Insert(r.Servers, i, sv)
			}
		}
		for _, g := range was.Gateways {
			if i, ok := r.gateway(g.Name); !ok {
				r.Gateways = slices.Insert(r.Gateways, i, g)
			}
		}
		if len(r.Servers) <= MaxServers && len(r.Gateways) <= MaxGateways {
			next.set(newEntry(r, r.encode()))
		}
	}
	return next
}

// Without returns the state less the entries that another one has, and less the
// servers with an address that one of the other's servers has: what a store says
// of a name or an address counts more than what was before it.
func (s *State) Without(other *State) *State {
	held := make(map[netip.Addr][]Service)
	for _, r := range other.Records() {
		for i := range r.Servers {
			held[r.Servers[i].Advertise] = append(held[r.Servers[i].Advertise], r.Servers[i].Services...)
		}
	}
	next := s.next(s.index)
	for _, was := range s.Records() {
		has := other.Record(was.Datacenter)
		if has == nil {
			has = &Record{}
		}
		r := *was
		r.Servers = slices.DeleteFunc(slices.Clone(was.Servers), func(sv Server) bool {
			_, known := has.Server(sv.Node)
			return known || overlap(held[sv.Advertise], sv.Services)
		})
		r.Gateways = slices.DeleteFunc(slices.Clone(was.Gateways), func(g Gateway) bool {
			_, known := has.Gateway(g.Name)
			return known
		})
		switch {
		case len(r.Servers)+len(r.Gateways) == 0:
			next.unset(r.Datacenter)
		case len(r.Servers)+len(r.Gateways) < len(was.Servers)+len(was.Gateways):
			next.set(newEntry(&r, r.encode()))
		}
	}
	return next
}
