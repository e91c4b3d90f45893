package sidecar

import (
	"time"

	"culvert/admin"
	"culvert/catalog"
	"culvert/federation"
	"culvert/stream"
)

// Status is what GET /v1/status answers: a contract with tools outside.
type Status struct {
	Kind       string          `json:"kind"` // always "sidecar"
	Datacenter string          `json:"datacenter"`
	Node       string          `json:"node"`
	Version    string          `json:"version"`
	Ready      bool            `json:"ready"`
	Capture    CaptureStatus   `json:"capture"`
	Peers      []PeerStatus    `json:"peers"`
	Gateways   []GatewayStatus `json:"gateways"`
	// Federation is nil without a federation block.
	Federation *federation.Status `json:"federation,omitempty"`
}

// PeerStatus is one peer. Packets and bytes are totals since the start; sent
// is what its sidecar took, received what the local server was given. Bytes
// are payload, packets and streams together.
type PeerStatus struct {
	Datacenter      string            `json:"datacenter"`
	Node            string            `json:"node"`
	Advertise       string            `json:"advertise"`
	Critical        bool              `json:"critical"` // by its federation's records: it has stopped renewing its entry
	Endpoint        string            `json:"endpoint"` // with redirect where its streams come from, "" with bind
	Path            string            `json:"path"`     // direct, local, remote, primary or native; plain where it is not captured
	Gateway         string            `json:"gateway"`  // the one in use, "" for none
	State           string            `json:"state"`    // up, dialing, idle or down: of the packet links, the best
	PacketsSent     uint64            `json:"packets_sent"`
	PacketsReceived uint64            `json:"packets_received"`
	BytesSent       uint64            `json:"bytes_sent"`
	BytesReceived   uint64            `json:"bytes_received"`
	Drops           map[string]uint64 `json:"drops"` // packets, by reason, both ways
	StreamsOpen     int               `json:"streams_open"`
	StreamsTotal    uint64            `json:"streams_total"`
	Sessions        int               `json:"sessions"`      // connections that this sidecar keeps for streams to it
	Authenticated   string            `json:"authenticated"` // the name that its certificate was verified for, "" before the first connection
	TLS             string            `json:"tls"`           // version of that connection
	LastError       string            `json:"last_error"`
}

// GatewayStatus is one gateway that the sidecar may dial.
type GatewayStatus struct {
	Address    string `json:"address"`
	Datacenter string `json:"datacenter"`
	Kind       string `json:"kind"`       // local, remote or primary
	Replicated bool   `json:"replicated"` // the federation names it, perhaps besides the configuration
	Healthy    bool   `json:"healthy"`
	LastError  string `json:"last_error"`
}

// Status describes the sidecar at this moment.
func (s *Sidecar) Status() Status {
	snap := s.catalog.Load()
	captured, endpoints := s.captureStatus()
	st := Status{
		Kind: "sidecar", Datacenter: snap.Self.Datacenter, Node: snap.Self.Node, Version: s.version,
		Ready: s.readiness().Ready, Peers: make([]PeerStatus, 0, len(snap.Peers)), Gateways: s.gatewayStatus(),
		Capture: captured, Federation: s.federated.status(s.cfg.Load()),
	}
	for _, p := range snap.Peers {
		peer := s.peerStatus(p)
		if at, ok := endpoints[p.Key]; ok {
			peer.Endpoint = at.String()
		}
		st.Peers = append(st.Peers, peer)
	}
	return st
}

func (s *Sidecar) gatewayStatus() []GatewayStatus {
	out := []GatewayStatus{}
	for _, g := range s.locator.Gateways() {
		out = append(out, GatewayStatus{
			Address: g.Address, Datacenter: g.Datacenter, Kind: g.Kind, Replicated: g.Replicated,
			Healthy: g.Healthy, LastError: g.LastError,
		})
	}
	return out
}

func (s *Sidecar) peerStatus(p catalog.Peer) PeerStatus {
	st := PeerStatus{
		Datacenter: p.Datacenter, Node: p.Node, Advertise: p.Advertise.String(), Critical: p.Critical,
		State: "idle", Drops: make(map[string]uint64),
	}
	path := s.locator.Path(p.Key)
	st.Path, st.Gateway = path.Kind, path.Gateway
	known := s.verified.get(p.Key)
	st.Authenticated, st.TLS = known.name, known.tls
	switch {
	case s.isPlain(p.Key):
		st.Path, st.Gateway = "plain", ""
	case known.native:
		st.Path = "native"
	}
	for _, l := range s.links.status(p.Key) {
		st.PacketsSent += l.PacketsSent
		st.BytesSent += l.BytesSent
		addDrops(st.Drops, l.Drops)
		if rank(l.State) > rank(st.State) {
			st.State = l.State
		}
		if l.LastError != "" {
			st.LastError = l.LastError
		}
	}
	st.Sessions = s.outbound.Sessions(p.Key)
	in := s.receiver.Received(p.Key)
	st.PacketsReceived, st.BytesReceived = in.Packets, in.Bytes
	addDrops(st.Drops, in.Drops)
	for _, t := range []stream.PeerStats{s.outbound.Peer(p.Key), s.inbound.Peer(p.Key)} {
		st.StreamsOpen += t.Open
		st.StreamsTotal += t.Total
		st.BytesSent += t.BytesSent
		st.BytesReceived += t.BytesReceived
		if t.LastError != "" {
			st.LastError = t.LastError
		}
	}
	return st
}

func addDrops(to, from map[string]uint64) {
	for reason, n := range from {
		to[reason] += n
	}
}

// rank orders link states for a peer that has several links: what works best
// is what the peer's state is called, but a failure is told before idleness.
func rank(state string) int {
	switch state {
	case "up":
		return 3
	case "dialing":
		return 2
	case "down":
		return 1
	}
	return 0
}

// readiness does not depend on peers and gateways: they are told, and decide
// nothing, as a sidecar whose peers are all away is no worse than another.
func (s *Sidecar) readiness() admin.Readiness {
	listening := admin.Check{Name: "listener", OK: s.listening.Load() && !s.draining.Load()}
	switch {
	case s.draining.Load():
		listening.Detail = "stopping"
	case !listening.OK:
		listening.Detail = "not started"
	}
	cert := admin.Check{Name: "certificate", OK: true}
	if err := s.certs.Valid(time.Now()); err != nil {
		cert.OK, cert.Detail = false, err.Error()
	}
	captured, _ := s.captureStatus()
	r := admin.All(listening, cert, admin.Check{Name: "capture", OK: captured.Blocked == "", Detail: captured.Blocked})
	r.Details = s.readyDetails()
	return r
}

type readyPeer struct {
	Peer  string `json:"peer"`
	State string `json:"state"`
}

func (s *Sidecar) readyDetails() any {
	peers := []readyPeer{}
	for _, p := range s.catalog.Load().Peers {
		state := "idle"
		for _, l := range s.links.status(p.Key) {
			if rank(l.State) > rank(state) {
				state = l.State
			}
		}
		peers = append(peers, readyPeer{p.String(), state})
	}
	return map[string]any{"peers": peers, "gateways": s.gatewayStatus()}
}
