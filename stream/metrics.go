package stream

import "github.com/prometheus/client_golang/prometheus"

// A direction is who dialled: out the local server, in the peer. For bytes it
// is where they go, whoever dialled.
type direction string

const (
	out direction = "out"
	in  direction = "in"
)

// Metrics counts streams. One value is shared by an [Outbound] and an
// [Inbound].
type Metrics struct {
	connections, bytesTotal, failures *prometheus.CounterVec
	openNow, sessionsOpen             *prometheus.GaugeVec
}

// NewMetrics registers the package's metrics with reg, each service's series
// at zero; with a nil reg they are counted and shown nowhere.
func NewMetrics(reg prometheus.Registerer, services ...string) *Metrics {
	labels := []string{"direction", "service"}
	m := &Metrics{
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_stream_connections_total",
			Help: "Streams established, dialled by the local server (out) or by a peer (in).",
		}, labels),
		openNow: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_stream_open",
			Help: "Streams open now, dialled by the local server (out) or by a peer (in).",
		}, labels),
		sessionsOpen: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_stream_sessions_open",
			Help: "Connections open now that carry streams of any number, begun by this sidecar (out) or by a peer's (in).",
		}, []string{"direction"}),
		bytesTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_stream_bytes_total",
			Help: "Payload bytes of streams, from the local server (out) and to it (in), whoever dialled.",
		}, labels),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_stream_failures_total",
			Help: "Streams that could not be established: the peer was not reached or refused (out), the local server refused (in).",
		}, []string{"direction"}),
	}
	for _, d := range []direction{out, in} {
		m.failures.WithLabelValues(string(d))
		m.sessions(d)
		for _, service := range services {
			m.series(d, service)
			m.bytes(d, service)
		}
	}
	if reg != nil {
		reg.MustRegister(m.connections, m.openNow, m.bytesTotal, m.failures, m.sessionsOpen)
	}
	return m
}

type series struct {
	connections prometheus.Counter
	open        prometheus.Gauge
}

func (m *Metrics) series(d direction, service string) series {
	return series{m.connections.WithLabelValues(string(d), service), m.openNow.WithLabelValues(string(d), service)}
}

func (m *Metrics) bytes(d direction, service string) prometheus.Counter {
	return m.bytesTotal.WithLabelValues(string(d), service)
}

func (m *Metrics) failed(d direction) { m.failures.WithLabelValues(string(d)).Inc() }

func (m *Metrics) sessions(d direction) prometheus.Gauge {
	return m.sessionsOpen.WithLabelValues(string(d))
}
