package capture

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts what a [Bind] or a [Redirect] does. Nil counts nothing.
type Metrics struct {
	endpoints prometheus.Gauge
	hairpin   *prometheus.CounterVec
	refused   *prometheus.CounterVec
	lost      prometheus.Gauge
	blocked   prometheus.Gauge
	repairs   prometheus.Counter
}

// NewMetrics registers the package's metrics.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		endpoints: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_capture_endpoints",
			Help: "Endpoints open: sockets on advertised addresses, the hairpin's own included (bind), or captured peers (redirect).",
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
	m.lost = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "culvert_capture_lost_addresses",
		Help: "Addresses of former peers that redirect refuses.",
	})
	m.blocked = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "culvert_capture_blocked",
		Help: "1 while the host's own firewall keeps the server and its redirected endpoints apart.",
	})
	m.repairs = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "culvert_capture_repairs_total",
		Help: "Times that redirect's rules were found changed by others and made anew.",
	})
	for _, kind := range []string{"packet", "stream"} {
		m.hairpin.WithLabelValues(kind)
		m.refused.WithLabelValues(kind)
	}
	reg.MustRegister(m.endpoints, m.hairpin, m.refused, m.lost, m.blocked, m.repairs)
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

func (m *Metrics) setLost(n int) {
	if m != nil {
		m.lost.Set(float64(n))
	}
}

func (m *Metrics) setBlocked(is bool) {
	if m == nil {
		return
	}
	if is {
		m.blocked.Set(1)
	} else {
		m.blocked.Set(0)
	}
}

func (m *Metrics) countRepair() {
	if m != nil {
		m.repairs.Inc()
	}
}

func (m *Metrics) setEndpoints(n int) {
	if m != nil {
		m.endpoints.Set(float64(n))
	}
}
