package state

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"slices"
)

// An entry is a record with its one form in JSON, which is made once however
// many ask for it.
type entry struct {
	Record
	raw       json.RawMessage
	addresses addresses // of its servers
}

func newEntry(r *Record, raw json.RawMessage) *entry {
	e := &entry{Record: *r, raw: raw}
	for i := range r.Servers {
		e.addresses.add(r.Servers[i].Advertise)
	}
	return e
}

// addresses tell of an address that it is not among them, or that it may be: whoever
// looks for one in all records passes over most of them. An index that finds it at
// once would have to be copied with every state.
type addresses [4]uint64

// bit is an address's place, by the hash FNV-1a.
func (*addresses) bit(a netip.Addr) (word, mask uint64) {
	hash := uint32(2166136261)
	for _, b := range a.As16() {
		hash = (hash ^ uint32(b)) * 16777619
	}
	place := uint64(hash >> 24)
	return place / 64, 1 << (place % 64)
}

func (x *addresses) add(a netip.Addr) {
	word, mask := x.bit(a)
	x[word] |= mask
}

// mayHave is false where none of the addresses that were added is a.
func (x *addresses) mayHave(a netip.Addr) bool {
	word, mask := x.bit(a)
	return x[word]&mask != 0
}

// A tally counts entries by kind and health.
type tally struct{ servers, criticalServers, gateways, criticalGateways int }

func (t *tally) of(k Kind, h Health) *int {
	switch {
	case k == KindServer && h == Critical:
		return &t.criticalServers
	case k == KindServer:
		return &t.servers
	case h == Critical:
		return &t.criticalGateways
	}
	return &t.gateways
}

// add counts what is in a record n times.
func (t *tally) add(r *Record, n int) {
	for i := range r.Servers {
		*t.of(KindServer, r.Servers[i].Health) += n
	}
	for i := range r.Gateways {
		*t.of(KindGateway, r.Gateways[i].Health) += n
	}
}

// find returns where a datacenter's entry is, or would be.
func (s *State) find(datacenter string) (int, bool) {
	return slices.BinarySearchFunc(s.entries, datacenter, func(e *entry, dc string) int { return cmp.Compare(e.Datacenter, dc) })
}

// entry is a datacenter's, nil if there is none.
func (s *State) entry(datacenter string) *entry {
	if i, ok := s.find(datacenter); ok {
		return s.entries[i]
	}
	return nil
}

// set puts an entry in its place. It is for a state that nobody else has yet, as
// unset is.
func (s *State) set(e *entry) {
	i, known := s.find(e.Datacenter)
	if known {
		s.count.add(&s.entries[i].Record, -1)
		s.entries[i] = e
	} else {
		s.entries = slices.Insert(s.entries, i, e)
	}
	s.count.add(&e.Record, 1)
}

// unset takes a datacenter's entry away, and tells whether there was one.
func (s *State) unset(datacenter string) bool {
	i, known := s.find(datacenter)
	if known {
		s.count.add(&s.entries[i].Record, -1)
		s.entries = slices.Delete(s.entries, i, i+1)
	}
	return known
}
