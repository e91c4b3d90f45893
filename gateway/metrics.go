package gateway

import (
	"github.com/prometheus/client_golang/prometheus"
)

// The results of a connection that had a route.
const (
	resultOK         = "ok"          // a backend was reached
	resultDialFailed = "dial_failed" // none was
)

// metrics of a gateway. Its datacenter labels are the configured ones.
type metrics struct {
	connections *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	open        *prometheus.GaugeVec
	refused     *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_gateway_connections_total",
			Help: "Connections with a route, by the datacenter they go to and result: ok (a backend was reached) or dial_failed.",
		}, []string{"datacenter", "result"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_gateway_bytes_total",
			Help: "Bytes passed on, by the datacenter their connection goes to and direction: in (from the dialling side) or out (back to it).",
		}, []string{"datacenter", "direction"}),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_gateway_open",
			Help: "Connections open now, by the datacenter they go to.",
		}, []string{"datacenter"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_gateway_refused_total",
			Help: "TLS connections refused before any backend was dialled, by reason.",
		}, []string{"reason"}),
	}
	reg.MustRegister(m.connections, m.bytes, m.open, m.refused)
	for _, r := range reasons() {
		m.refused.WithLabelValues(r)
	}
	return m
}

// flow is the metrics of one destination, looked up once.
type flow struct {
	ok, dialFailed prometheus.Counter
	in, out        prometheus.Counter
	open           prometheus.Gauge
}

// to returns the metrics of a datacenter, at zero if they are new.
func (m *metrics) to(datacenter string) *flow {
	return &flow{
		ok:         m.connections.WithLabelValues(datacenter, resultOK),
		dialFailed: m.connections.WithLabelValues(datacenter, resultDialFailed),
		in:         m.bytes.WithLabelValues(datacenter, "in"),
		out:        m.bytes.WithLabelValues(datacenter, "out"),
		open:       m.open.WithLabelValues(datacenter),
	}
}
