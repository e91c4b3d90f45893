package capture

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts what a [Bind] does. Nil counts nothing.
type Metrics struct {
	endpoints prometheus.Gauge
	hairpin   *prometheus.CounterVec
	refused   *prometheus.CounterVec
}

// NewMetrics registers the package's metrics.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		endpoints: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_capture_endpoints",
			Help: "Sockets open on advertised addresses, the hairpin's own included.",
		}),
		hairpin: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_capture_hairpin_total",
			Help: "Packets and connections that the server sent to its own advertised address, handed straight back.",
		}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_capture_refused_total",
			Help: "Packets that did not come from the server's address and connections that did not come from this host.",
		}, []string{"kind"}),
	}
	for _, kind := range []string{"packet", "stream"} {
		m.hairpin.WithLabelValues(kind)
		m.refused.WithLabelValues(kind)
	}
	reg.MustRegister(m.endpoints, m.hairpin, m.refused)
	return m
}

func kindOf(packet bool) string {
	if packet {
		return "packet"
	}
	return "stream"
}

func (m *Metrics) countHairpin(packet bool) {
	if m != nil {
		m.hairpin.WithLabelValues(kindOf(packet)).Inc()
	}
}

func (m *Metrics) countRefused(packet bool) {
	if m != nil {
		m.refused.WithLabelValues(kindOf(packet)).Inc()
	}
}

func (m *Metrics) setEndpoints(n int) {
	if m != nil {
		m.endpoints.Set(float64(n))
	}
}
