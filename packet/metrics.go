package packet

import (
	"github.com/prometheus/client_golang/prometheus"

	"culvert/catalog"
)

// Reason says why a packet was dropped; the set is closed. It is an error so that a deliver function can return
// it, see [Receiver.Serve].
type Reason string

// Outward: packets of the local server that did not get to their peer.
const (
	ReasonQueueFull   Reason = "queue_full"   // newer packets took its place
	ReasonExpired     Reason = "expired"      // waited longer than the age limit
	ReasonWriteError  Reason = "write_error"  // two connections broke while it was written
	ReasonRefused     Reason = "refused"      // written, but the connection ended before it was up
	ReasonNoRoute     Reason = "no_route"     // the catalog knows no such peer (any more)
	ReasonClosed      Reason = "closed"       // the link is stopped
	ReasonEmpty       Reason = "empty"        // an empty datagram: on the wire it would be a keepalive
	ReasonWrongSource Reason = "wrong_source" // not sent from the local server's address
)

// Both ways.
const (
	ReasonOversize Reason = "oversize" // longer than [MaxPayload]
)

// Inward: packets of a peer that did not get to the local server.
const (
	ReasonUnknownPeer  Reason = "unknown_peer"  // the catalog does not know the sender, so it has no address
	ReasonNoNode       Reason = "no_node"       // the sender's certificate names no node
	ReasonDeliverError Reason = "deliver_error" // the local server's socket did not take it
)

// Error implements error.
func (r Reason) Error() string { return "packet dropped: " + string(r) }

func reasonsOut() []Reason {
	return []Reason{
		ReasonQueueFull, ReasonExpired, ReasonWriteError, ReasonRefused, ReasonNoRoute, ReasonClosed, ReasonEmpty,
		ReasonWrongSource, ReasonOversize,
	}
}

func reasonsIn() []Reason {
	return []Reason{ReasonOversize, ReasonUnknownPeer, ReasonNoNode, ReasonDeliverError}
}

const (
	directionIn  = "in"
	directionOut = "out"
)

// Metrics counts packets. One value is shared by every [Link] and [Receiver] of a process.
type Metrics struct {
	frames, bytes, drops *prometheus.CounterVec
}

// NewMetrics registers the package's metrics with reg; with a nil reg they are counted and shown nowhere.
// The series of drops exist from the start, those of a peer from its first [Link] or received packet on.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	peer := []string{"direction", "peer_datacenter", "peer_node"}
	m := &Metrics{
		frames: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_packet_frames_total",
			Help: "Packets carried to (out) and delivered from (in) a peer.",
		}, peer),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_packet_bytes_total",
			Help: "Payload bytes of the packets carried to (out) and delivered from (in) a peer.",
		}, peer),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_packet_drops_total",
			Help: "Packets dropped, by direction and reason.",
		}, []string{"direction", "reason"}),
	}
	for _, r := range reasonsOut() {
		m.drops.WithLabelValues(directionOut, string(r))
	}
	for _, r := range reasonsIn() {
		m.drops.WithLabelValues(directionIn, string(r))
	}
	if reg != nil {
		reg.MustRegister(m.frames, m.bytes, m.drops)
	}
	return m
}

// DroppedOut counts one packet of the local server that was dropped outside of a [Link].
func (m *Metrics) DroppedOut(r Reason) { m.dropped(directionOut, r, 1) }

// DroppedIn counts one packet of a peer that was dropped outside of [Receiver.Serve].
func (m *Metrics) DroppedIn(r Reason) { m.dropped(directionIn, r, 1) }

func (m *Metrics) dropped(direction string, r Reason, n uint64) {
	m.drops.WithLabelValues(direction, string(r)).Add(float64(n))
}

// Forget deletes the series of a peer that left the catalog. Stop its links first, and see [Receiver.Forget].
func (m *Metrics) Forget(key catalog.Key) {
	for _, d := range []string{directionIn, directionOut} {
		m.frames.DeleteLabelValues(d, key.Datacenter, key.Node)
		m.bytes.DeleteLabelValues(d, key.Datacenter, key.Node)
	}
}

// series are one peer's two counters in one direction.
type series struct{ frames, bytes prometheus.Counter }

func (m *Metrics) series(direction string, key catalog.Key) series {
	return series{
		frames: m.frames.WithLabelValues(direction, key.Datacenter, key.Node),
		bytes:  m.bytes.WithLabelValues(direction, key.Datacenter, key.Node),
	}
}

func (s series) add(frames, bytes uint64) {
	s.frames.Add(float64(frames))
	s.bytes.Add(float64(bytes))
}
