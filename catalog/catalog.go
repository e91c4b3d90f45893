// Package catalog says who exists: the servers of the federation, the gateways
// and how each datacenter is reached. It is a value that is replaced whole and
// can be watched; where its contents come from is not its business.
//
//	c := catalog.New(&catalog.Snapshot{Self: self, Peers: peers})
//	for {
//		changed := c.Changed()
//		use(c.Load())
//		select {
//		case <-changed:
//		case <-ctx.Done():
//			return
//		}
//	}
//
// A [Snapshot] that was given to New or Store belongs to the catalog and is
// never changed again, so readers need no lock. A [Catalog] is for any number
// of goroutines. It validates nothing: that is done where a snapshot is made.
package catalog

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// A Key names one server: two servers of one node name in two datacenters are
// two servers.
type Key struct {
	Datacenter string // one DNS label
	Node       string // one or more DNS labels; "" where a certificate names none
}

// String returns "datacenter/node".
func (k Key) String() string { return k.Datacenter + "/" + k.Node }

// Compare orders keys by datacenter, then by node.
func (k Key) Compare(o Key) int {
	return cmp.Or(strings.Compare(k.Datacenter, o.Datacenter), strings.Compare(k.Node, o.Node))
}

// A Mode is how a datacenter is reached.
type Mode string

// The modes. The first three are the configuration's; the last one is for what is
// known from the federation.
const (
	ModeLocal  Mode = "local"  // through the gateways of the own datacenter
	ModeRemote Mode = "remote" // through the gateways of the other datacenter
	ModeDirect Mode = "direct" // straight to the peer's sidecar
	// ModeAuto is all ways through gateways, in this order: the own
	// datacenter's, the other's, and Fallback.
	ModeAuto Mode = "auto"
)

// A Peer is another server of the federation, in whatever datacenter.
type Peer struct {
	Key
	// Advertise is the address that its peers know it by, the same everywhere.
	Advertise netip.Addr
	// Address is its sidecar, host:port; "" where it is not reached directly.
	Address string
	// Critical is a peer that is known to have stopped renewing its entry. It
	// still exists, and may be dialled.
	Critical bool
}

// A Datacenter is another datacenter. A gateway is host:port, or "srv:NAME" for
// what the SRV records of a name lead to.
type Datacenter struct {
	Name string
	Mode Mode
	// Gateways are those of the configuration, Replicated those that the
	// datacenter itself has published. They count together: what is replicated
	// takes no configured one away.
	Gateways, Replicated []string
	// Fallback is for ModeAuto alone: the gateways by which the primary
	// datacenter was found at first, "primary_gateways" of the configuration.
	Fallback []string
}

// A Snapshot is all that is known at one moment.
type Snapshot struct {
	Self        Key
	Gateways    []string // of the own datacenter, as those of a Datacenter
	Replicated  []string // further ones of the own datacenter, known from its records
	Peers       []Peer   // in the order of their keys, which New and Store see to
	Datacenters []Datacenter
	// Join are sidecars of the own datacenter, host:port each, whose nodes need
	// not be known: any of them will do for what any server can do.
	Join []string
}

// Peer finds a peer by its key.
func (s *Snapshot) Peer(k Key) (Peer, bool) {
	i, ok := slices.BinarySearchFunc(s.Peers, k, func(p Peer, k Key) int { return p.Compare(k) })
	if !ok {
		return Peer{}, false
	}
	return s.Peers[i], true
}

// Datacenter finds a datacenter by its name.
func (s *Snapshot) Datacenter(name string) (Datacenter, bool) {
	for i := range s.Datacenters {
		if s.Datacenters[i].Name == name {
			return s.Datacenters[i], true
		}
	}
	return Datacenter{}, false
}

// Knows tells whether anything is known of a datacenter: it is the own one, it is
// among Datacenters, or it has a peer.
func (s *Snapshot) Knows(datacenter string) bool {
	if datacenter == "" {
		return false
	}
	if _, ok := s.Datacenter(datacenter); ok || datacenter == s.Self.Datacenter {
		return true
	}
	return len(s.In(datacenter)) > 0
}

// In returns the peers of a datacenter. They must not be changed.
func (s *Snapshot) In(datacenter string) []Peer {
	at := func(p Peer, name string) int { return strings.Compare(p.Datacenter, name) }
	from, _ := slices.BinarySearchFunc(s.Peers, datacenter, at)
	rest := s.Peers[from:]
	n := slices.IndexFunc(rest, func(p Peer) bool { return p.Datacenter != datacenter })
	if n < 0 {
		n = len(rest)
	}
	return rest[:n:n]
}

// A Catalog holds the snapshot in force. Make one with [New].
type Catalog struct {
	now atomic.Pointer[Snapshot]

	mu      sync.Mutex
	changed chan struct{}
}

// New returns a catalog that holds s. It sorts s.Peers and owns s from then on.
func New(s *Snapshot) *Catalog {
	c := &Catalog{changed: make(chan struct{})}
	c.Store(s)
	return c
}

// Load returns the snapshot in force. It must not be changed.
func (c *Catalog) Load() *Snapshot { return c.now.Load() }

// Store replaces the snapshot and wakes whoever waits on Changed. It sorts
// s.Peers and owns s from then on.
func (c *Catalog) Store(s *Snapshot) {
	slices.SortFunc(s.Peers, func(a, b Peer) int { return a.Compare(b.Key) })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now.Store(s)
	close(c.changed)
	c.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next Store. Ask for it before
// Load, and no change is missed.
func (c *Catalog) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}
