package locator

import (
	"context"
	"fmt"
	"slices"

	"culvert/catalog"
)

// A poolKey is a datacenter's gateways of one kind, one peer's sidecar, or, where
// that has no node, any sidecar of a datacenter.
type poolKey struct {
	kind       string
	datacenter string // of the gateways
	peer       catalog.Key
	onDemand   bool // as of PoolOptions
}

type pool struct {
	*Pool
	given []Endpoint         // to Set
	stop  context.CancelFunc // nil until it runs
}

func (l *Locator) newPool(key poolKey) *pool {
	forbid := l.o.Forbid
	if key.kind == KindLocal {
		forbid = nil // it bounds what other datacenters claim
	}
	return &pool{Pool: NewPool(PoolOptions{
		Resolver: l.o.Resolver, Control: l.o.Control, Dial: l.o.Dial, Forbid: forbid, Log: l.o.Log, Metrics: l.o.Metrics,
		NoProbe: key.kind == KindDirect && key.peer.Node != "", OnDemand: key.onDemand,
	})}
}

func localKey(s *catalog.Snapshot) poolKey {
	return poolKey{kind: KindLocal, datacenter: s.Self.Datacenter}
}

// sidecarKey is the pool of one peer's sidecar, or of any of its datacenter's.
func sidecarKey(to catalog.Key) poolKey {
	return poolKey{kind: KindDirect, datacenter: to.Datacenter, peer: to, onDemand: to.Node == ""}
}

// throughGateways are the pools through which another datacenter is reached, in
// the order in which they are tried; none with ModeDirect. With ModeAuto, as the
// federation has many datacenters and most of these pools are never dialled, they
// are probed on demand alone.
func throughGateways(s *catalog.Snapshot, datacenter string, mode catalog.Mode) []poolKey {
	switch mode {
	case catalog.ModeLocal:
		return []poolKey{localKey(s)}
	case catalog.ModeRemote:
		return []poolKey{{kind: KindRemote, datacenter: datacenter}}
	case catalog.ModeAuto:
		return []poolKey{
			localKey(s),
			{kind: KindRemote, datacenter: datacenter, onDemand: true},
			{kind: KindPrimary, datacenter: datacenter, onDemand: true},
		}
	default:
		return nil
	}
}

// modeOf tells how a datacenter is reached.
func modeOf(s *catalog.Snapshot, datacenter string) catalog.Mode {
	if datacenter == s.Self.Datacenter {
		return catalog.ModeDirect
	}
	if d, ok := s.Datacenter(datacenter); ok {
		return d.Mode
	}
	return catalog.ModeLocal
}

// route tells which pools lead to a peer, at least one. Called with mu held.
func (l *Locator) route(to catalog.Key) ([]tier, error) {
	s := l.seen
	if !s.Knows(to.Datacenter) {
		return nil, unknown(to)
	}
	mode := modeOf(s, to.Datacenter)
	keys := throughGateways(s, to.Datacenter, mode)
	if keys == nil {
		keys = []poolKey{sidecarKey(to)}
	}
	tiers := make([]tier, 0, len(keys))
	for _, key := range keys {
		if p := l.pools[key]; p != nil {
			tiers = append(tiers, tier{key.kind, key.datacenter, p.Pool})
		}
	}
	if len(tiers) > 0 {
		return tiers, nil
	}
	return nil, lacking(s, to, mode)
}

// lacking tells why there is no way to a peer of a datacenter that is known.
func lacking(s *catalog.Snapshot, to catalog.Key, mode catalog.Mode) error {
	var why string
	switch own := s.Self.Datacenter; mode {
	case catalog.ModeLocal:
		why = fmt.Sprintf("no gateway of datacenter %q is known (gateways names them)", own)
	case catalog.ModeRemote:
		why = fmt.Sprintf("no gateway of datacenter %q is known (its datacenter block names them)", to.Datacenter)
	case catalog.ModeAuto:
		why = fmt.Sprintf("no gateway of datacenter %q or %q is known (gateways and the federation name them)", own, to.Datacenter)
	default:
		if !has(s, to) && (to.Node != "" || to.Datacenter == own) {
			return unknown(to)
		}
		why = "no address of a sidecar is known (the address of its peer block, or the federation)"
	}
	return fmt.Errorf("find a path to %s: %s", to, why)
}

func unknown(to catalog.Key) error {
	return fmt.Errorf("find %s: %w (a peer block or the federation names it)", to, ErrUnknownPeer)
}

// wanted returns the endpoints of each pool that a snapshot asks for.
func wanted(s *catalog.Snapshot) map[poolKey][]Endpoint {
	out := make(map[poolKey][]Endpoint)
	put := func(key poolKey, endpoints []Endpoint) {
		if len(endpoints) > 0 {
			out[key] = endpoints
		}
	}
	sidecars := func(datacenter string, more []string) {
		all := slices.Clone(more)
		for _, p := range s.In(datacenter) {
			if p.Address != "" {
				put(sidecarKey(p.Key), Configured(p.Address))
				all = append(all, p.Address)
			}
		}
		put(sidecarKey(catalog.Key{Datacenter: datacenter}), Configured(all...))
	}
	put(localKey(s), union(catalog.Datacenter{Gateways: s.Gateways, Replicated: s.Replicated}))
	sidecars(s.Self.Datacenter, s.Join)
	for _, d := range s.Datacenters {
		if d.Name == s.Self.Datacenter {
			continue
		}
		keys := throughGateways(s, d.Name, d.Mode)
		if keys == nil {
			sidecars(d.Name, nil)
		}
		for _, key := range keys {
			switch key.kind {
			case KindRemote:
				put(key, union(d))
			case KindPrimary:
				put(key, Configured(d.Fallback...))
			default:
			}
		}
	}
	return out
}

// union is the gateways of a datacenter, those of the configuration and those of
// replicated state. What the configuration names as a fallback is no stranger.
func union(d catalog.Datacenter) []Endpoint {
	out := Configured(d.Gateways...)
	for _, address := range d.Replicated {
		out = append(out, Endpoint{Address: address, Replicated: true})
		if slices.Contains(d.Fallback, address) {
			out = append(out, Endpoint{Address: address})
		}
	}
	return out
}
