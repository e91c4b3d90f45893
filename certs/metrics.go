package certs

import "github.com/prometheus/client_golang/prometheus"

// Metrics tells about the certificates of one [Source]:
//
//	culvert_certs_not_after_seconds{certificate="ca|leaf"}  when it expires, in Unix seconds; ca: the CA that does first
//	culvert_certs_reloads_total{result="ok|failed"}
type Metrics struct {
	leaf, ca   prometheus.Gauge
	ok, failed prometheus.Counter
}

// NewMetrics creates the metrics and registers them; nil registers nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	notAfter := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "culvert_certs_not_after_seconds",
		Help: "When the certificate in use expires, in seconds since 1970; ca is the one of the bundle that expires first.",
	}, []string{"certificate"})
	reloads := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "culvert_certs_reloads_total",
		Help: "Attempts to read the certificates again. After a failed one the old ones stay in use.",
	}, []string{"result"})
	if reg != nil {
		reg.MustRegister(notAfter, reloads)
	}
	return &Metrics{
		leaf:   notAfter.WithLabelValues("leaf"),
		ca:     notAfter.WithLabelValues("ca"),
		ok:     reloads.WithLabelValues("ok"),
		failed: reloads.WithLabelValues("failed"),
	}
}

func (m *Metrics) set(g *generation) {
	m.leaf.Set(float64(g.chain[0].NotAfter.Unix()))
	first := g.trust.cas[0].NotAfter
	for _, ca := range g.trust.cas {
		if ca.NotAfter.Before(first) {
			first = ca.NotAfter
		}
	}
	m.ca.Set(float64(first.Unix()))
}
