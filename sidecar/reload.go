package sidecar

import (
	"fmt"
	"strings"

	"go.uber.org/zap"

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
	return "peers, gateways, datacenters and the certificates' contents change live; restart the sidecar for the rest"
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
	next := snapshot(cfg)
	useCertificates, err := s.certs.Reload()
	if err != nil {
		return fmt.Errorf("reload certificates: %w", err)
	}
	if err := s.capture.Set(next.Peers); err != nil {
		return fmt.Errorf("reload peers: %w", err)
	}
	useCertificates()
	s.cfg.Store(cfg)
	before := s.catalog.Load()
	s.catalog.Store(next)
	s.links.set(s.carried(s.catalog.Load().Peers))
	s.forget(before, s.catalog.Load())
	return nil
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
		s.log.Info("peer left the configuration", zap.Stringer("peer", p.Key))
	}
}
