package alpn

import "github.com/prometheus/client_golang/prometheus"

// Metrics are shared by the [Server] and the [Dialer] of one process.
type Metrics struct {
	wireIn, wireOut       prometheus.Counter
	acceptOK, acceptError prometheus.Counter
	dialOK, dialError     prometheus.Counter
}

// NewMetrics registers the metrics of this package.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	wire := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_alpn_wire_bytes_total",
		Help: "TLS bytes read (in) and written (out) on accepted and dialled connections.",
	}, []string{"direction"})
	handshakes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_alpn_handshakes_total",
		Help: "TLS handshakes that ended, by side (accept, dial) and result (ok, failed).",
	}, []string{"side", "result"})
	reg.MustRegister(wire, handshakes)
	return &Metrics{
		wireIn:      wire.WithLabelValues("in"),
		wireOut:     wire.WithLabelValues("out"),
		acceptOK:    handshakes.WithLabelValues("accept", "ok"),
		acceptError: handshakes.WithLabelValues("accept", "failed"),
		dialOK:      handshakes.WithLabelValues("dial", "ok"),
		dialError:   handshakes.WithLabelValues("dial", "failed"),
	}
}

// orNew lets the zero Options count into a registry that nobody reads.
func (m *Metrics) orNew() *Metrics {
	if m == nil {
		return NewMetrics(prometheus.NewRegistry())
	}
	return m
}
