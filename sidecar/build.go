package sidecar

import (
	"culvert/alpn"
	"culvert/capture"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/stream"
)

// What follows turns the configuration into each part's own terms.

const kindPacket = "packet"

func snapshot(cfg *config.Sidecar) *catalog.Snapshot {
	s := &catalog.Snapshot{
		Self:     catalog.Key{Datacenter: cfg.Datacenter, Node: cfg.Node},
		Gateways: cfg.Gateways,
	}
	for _, p := range cfg.Peers {
		s.Peers = append(s.Peers, catalog.Peer{
			Key:       catalog.Key{Datacenter: p.Datacenter, Node: p.Node},
			Advertise: p.Advertise, Address: p.Address,
		})
	}
	for _, d := range cfg.Datacenters {
		s.Datacenters = append(s.Datacenters, catalog.Datacenter{Name: d.Name, Gateways: d.Gateways, Mode: catalog.Mode(d.Mode)})
	}
	return s
}

func protocols(services []config.Service) []alpn.Service {
	var out []alpn.Service
	for _, s := range services {
		kind := alpn.KindStream
		if s.Kind == kindPacket {
			kind = alpn.KindPacket
		}
		service := alpn.Service{Name: s.Name, Kind: kind, ALPN: s.ALPN}
		if s.Types {
			service.Types = alpn.ConsulTypes()
		}
		out = append(out, service)
	}
	return out
}

// typeRules are those of the services that have types.
func (s *Sidecar) typeRules(cfg *config.Sidecar) map[string]stream.TypeRules {
	rules := stream.TypeRules{TLS: []stream.Type{alpn.ConsulTLS, alpn.ConsulTLSInsecure}, TLSFor: alpn.ConsulTLS}
	for _, t := range alpn.ConsulTypes() {
		if t.SameDatacenter {
			rules.SameDatacenter = append(rules.SameDatacenter, stream.Type(t.Byte))
		}
	}
	if cfg.Server.TLS {
		rules.Secure = s.secure
	}
	out := make(map[string]stream.TypeRules)
	for _, sv := range cfg.Services {
		if sv.Types {
			out[sv.Name] = rules
		}
	}
	return out
}

// alone tells the streams that are known to be long. Sessions are not for them.
func alone(_ string, first stream.Type) bool { return first == alpn.ConsulSnapshot }

func endpoints(services []config.Service) []capture.Service {
	var out []capture.Service
	for _, s := range services {
		out = append(out, capture.Service{Name: s.Name, Packet: s.Kind == kindPacket, Port: s.Port, Local: s.Local})
	}
	return out
}

// named returns the names of the services that are of kind packet, or that are not.
func named(services []config.Service, packet bool) []string {
	var out []string
	for _, s := range services {
		if (s.Kind == kindPacket) == packet {
			out = append(out, s.Name)
		}
	}
	return out
}

func keyOf(id certs.Identity) catalog.Key {
	return catalog.Key{Datacenter: id.Datacenter, Node: id.Node}
}

func (s *Sidecar) self() catalog.Key { return s.catalog.Load().Self }
