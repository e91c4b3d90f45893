package sidecar

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.uber.org/zap"

	"culvert/capture"
	"culvert/catalog"
	"culvert/config"
)

// A restartError names settings that cannot change in a running process.
type restartError struct{ settings []string }

func (e *restartError) Error() string {
	return "a reload cannot change " + strings.Join(e.settings, ", ")
}

// Hint tells what can.
func (e *restartError) Hint() string {
	return "peers, gateways, datacenters, the certificates' contents, and of the federation primary_gateways, retry_join and accept change live; restart the sidecar for the rest"
}

// Reload makes cfg the running configuration: peers, gateways and datacenters,
// and the certificates read again from their files. It changes all or nothing:
// what cannot be had is told, and the old state serves on. Connections of peers
// that stay are not touched.
func (s *Sidecar) Reload(cfg *config.Sidecar) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	old := s.cfg.Load()
	if fixed := config.Restart(old, cfg); len(fixed) > 0 {
		return &restartError{fixed}
	}
	useCertificates, err := s.certs.Reload()
	if err != nil {
		return fmt.Errorf("reload certificates: %w", err)
	}
	next, useReader := s.reread(cfg)
	if err := s.use(cfg, next, s.capture.Set); err != nil {
		return fmt.Errorf("reload peers: %w", err)
	}
	useCertificates()
	useReader()
	s.cfg.Store(cfg)
	return nil
}

// use makes a snapshot the running one: capture is told its peers, then the rest
// is. It changes all or nothing, but for peers of the federation's records that
// this host cannot capture: they are left out, and told.
func (s *Sidecar) use(cfg *config.Sidecar, next *catalog.Snapshot, captured func([]catalog.Peer) error) error {
	configured := make(map[catalog.Key]bool, len(cfg.Peers))
	for _, p := range cfg.Peers {
		configured[catalog.Key{Datacenter: p.Datacenter, Node: p.Node}] = true
	}
	kept, out, err := captureMost(next.Peers, captured, func(k catalog.Key) bool { return !configured[k] })
	if err != nil {
		return err
	}
	next.Peers = kept
	s.federated.uncaptured(out)
	before := s.catalog.Load()
	s.catalog.Store(next)
	s.links.set(s.carried(next.Peers))
	s.forget(before, next)
	return nil
}

// captureMost has peers captured, and leaves out those that cannot be, as long as
// they may be left out.
func captureMost(peers []catalog.Peer, capture func([]catalog.Peer) error, optional func(catalog.Key) bool) (kept []catalog.Peer, out map[catalog.Key]error, err error) {
	out = make(map[catalog.Key]error)
	for {
		err := capture(peers)
		if err == nil {
			return peers, out, nil
		}
		before := len(out)
		for _, one := range single(err) {
			key, known := faulty(one)
			if !known || !optional(key) {
				return nil, nil, err
			}
			out[key] = one
		}
		if len(out) == before {
			return nil, nil, err
		}
		peers = slices.DeleteFunc(slices.Clone(peers), func(p catalog.Peer) bool { return out[p.Key] != nil })
	}
}

// single takes errors that were joined apart.
func single(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error }) // a join at the very top, as errors.Join makes it
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, single(e)...)
	}
	return all
}

// faulty tells which peer an error of the capture is about.
func faulty(err error) (catalog.Key, bool) {
	if e, ok := errors.AsType[*capture.EndpointError](err); ok {
		return e.Peer, true
	}
	if e, ok := errors.AsType[*capture.PeerError](err); ok {
		return e.Peer, true
	}
	return catalog.Key{}, false
}

// forget drops what is kept of peers that left.
func (s *Sidecar) forget(before, now *catalog.Snapshot) {
	for _, p := range before.Peers {
		if _, stays := now.Peer(p.Key); stays {
			continue
		}
		s.receiver.Forget(p.Key)
		s.packets.Forget(p.Key)
		s.outbound.Forget(p.Key)
		s.inbound.Forget(p.Key)
		s.verified.forget(p.Key)
		s.log.Info("peer left", zap.Stringer("peer", p.Key))
	}
}
