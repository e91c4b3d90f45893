package catalog

import "slices"

// Sort puts the peers in the order of their keys.
func (s *Snapshot) Sort() {
	slices.SortFunc(s.Peers, func(a, b Peer) int { return a.Compare(b.Key) })
}

// Equal tells whether two snapshots, both in order, say the same.
func (s *Snapshot) Equal(o *Snapshot) bool {
	return s.Self == o.Self && slices.Equal(s.Gateways, o.Gateways) && slices.Equal(s.Replicated, o.Replicated) && slices.Equal(s.Join, o.Join) &&
		slices.Equal(s.Peers, o.Peers) && slices.EqualFunc(s.Datacenters, o.Datacenters, func(a, b Datacenter) bool {
		return a.Name == b.Name && a.Mode == b.Mode && slices.Equal(a.Gateways, b.Gateways) &&
			slices.Equal(a.Replicated, b.Replicated) && slices.Equal(a.Fallback, b.Fallback)
	})
}
