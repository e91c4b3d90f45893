package locator

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts dials and probes and shows the health of endpoints. One value
// is shared by every pool of a process.
type Metrics struct {
	dials, probes *prometheus.CounterVec
	health        *prometheus.GaugeVec
}

// NewMetrics registers the package's metrics with reg; with a nil reg they are
// counted and shown nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		dials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_locator_dials_total",
			Help: "TCP dials towards peers, by path (direct, local, remote) and result (ok, failed).",
		}, []string{"kind", "result"}),
		probes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_locator_probes_total",
			Help: "TCP probes of gateways and sidecars, by result (ok, failed).",
		}, []string{"result"}),
		health: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_locator_gateway_healthy",
			Help: "1 while a gateway (at a gateway also a sidecar) answers, 0 while it does not; by its configured address.",
		}, []string{"gateway"}),
	}
	for _, result := range []string{"ok", "failed"} {
		m.probes.WithLabelValues(result)
		for _, kind := range []string{KindDirect, KindLocal, KindRemote} {
			m.dials.WithLabelValues(kind, result)
		}
	}
	if reg != nil {
		reg.MustRegister(m.dials, m.probes, m.health)
	}
	return m
}

func result(ok bool) string {
	if ok {
		return "ok"
	}
	return "failed"
}

func (m *Metrics) dialled(kind string, ok bool) { m.dials.WithLabelValues(kind, result(ok)).Inc() }
func (m *Metrics) probed(ok bool)               { m.probes.WithLabelValues(result(ok)).Inc() }
func (m *Metrics) forget(address string)        { m.health.DeleteLabelValues(address) }

func (m *Metrics) healthy(address string, ok bool) {
	v := 0.0
	if ok {
		v = 1
	}
	m.health.WithLabelValues(address).Set(v)
}
