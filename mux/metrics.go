package mux

import "github.com/prometheus/client_golang/prometheus"

// The reasons for which this package refuses a connection.
const (
	reasonNotTLS           = "not_tls"
	reasonClosedEarly      = "closed_early"
	reasonFirstByteTimeout = "first_byte_timeout"
	reasonLimitSource      = "limit_source"
	reasonLimitPending     = "limit_pending"
)

// Metrics counts connections. Whoever refuses one after the mux has handed it
// on counts it here too, so that all refusals stand in one place.
type Metrics struct {
	refused      *prometheus.CounterVec
	open         prometheus.Gauge
	tls, plain   prometheus.Counter
	acceptErrors prometheus.Counter
}

// NewMetrics registers the package's metrics with reg; with a nil reg they are
// counted and shown nowhere. The further reasons are those of the handlers.
func NewMetrics(reg prometheus.Registerer, reasons ...string) *Metrics {
	m := &Metrics{
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_mux_refused_total",
			Help: "Inbound connections refused, by reason; cert_ are faults of the client's certificate.",
		}, []string{"reason"}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_mux_connections",
			Help: "Inbound connections open now.",
		}),
		acceptErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_mux_accept_errors_total",
			Help: "Connections that the system could not accept.",
		}),
	}
	accepted := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_mux_accepted_total",
		Help: "Inbound connections handed on, by what they begin like (tls, plain).",
	}, []string{"kind"})
	m.tls, m.plain = accepted.WithLabelValues("tls"), accepted.WithLabelValues("plain")
	for _, r := range append([]string{reasonNotTLS, reasonClosedEarly, reasonFirstByteTimeout, reasonLimitSource, reasonLimitPending}, reasons...) {
		m.refused.WithLabelValues(r)
	}
	if reg != nil {
		reg.MustRegister(m.refused, m.open, m.acceptErrors, accepted)
	}
	return m
}

// Refused counts one connection that was refused.
func (m *Metrics) Refused(reason string) { m.refused.WithLabelValues(reason).Inc() }
