package federation

import (
	"github.com/prometheus/client_golang/prometheus"

	"culvert/federation/state"
)

// Metrics count what a process does in its federation.
type Metrics struct {
	refusals      *prometheus.CounterVec
	registrations *prometheus.CounterVec
	reads         *prometheus.CounterVec
	repairs       prometheus.Counter
	kept          prometheus.Gauge
	entries       *prometheus.GaugeVec
	index         prometheus.Gauge
}

// NewMetrics returns metrics in a registry; nil means none.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_federation_refused_total",
			Help: "Requests of others that were refused, by reason.",
		}, []string{"reason"}),
		registrations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_federation_registrations_total",
			Help: "Registrations and renewals of the own entry, by result.",
		}, []string{"result"}),
		reads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_federation_reads_total",
			Help: "Messages of the primary with records, and questions that came to nothing, by result (ok, error).",
		}, []string{"result"}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_federation_repairs_total",
			Help: "Comparisons with the primary that found records to differ.",
		}),
		kept: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_federation_kept_out",
			Help: "Entries, or parts of entries, that are not taken.",
		}),
		entries: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_federation_entries",
			Help: "Entries that are known, by kind and health.",
		}, []string{"kind", "health"}),
		index: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_federation_index",
			Help: "Index of the state that is known.",
		}),
	}
	for _, reason := range []string{refusedCertificate, refusedOwner, refusedInvalid, refusedFull, state.ConflictName, state.ConflictAddress, state.ConflictLeft} {
		m.refusals.WithLabelValues(reason)
	}
	for _, v := range []*prometheus.CounterVec{m.registrations, m.reads} {
		v.WithLabelValues("ok")
		v.WithLabelValues("error")
	}
	m.Show(state.New())
	if reg != nil {
		reg.MustRegister(m.refusals, m.registrations, m.reads, m.repairs, m.kept, m.entries, m.index)
	}
	return m
}

func result(ok bool) string {
	if ok {
		return "ok"
	}
	return "error"
}

func (m *Metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }
func (m *Metrics) registered(ok bool)    { m.registrations.WithLabelValues(result(ok)).Inc() }
func (m *Metrics) read(ok bool)          { m.reads.WithLabelValues(result(ok)).Inc() }
func (m *Metrics) repaired()             { m.repairs.Inc() }

// KeptOut shows how much of the records is not taken.
func (m *Metrics) KeptOut(n int) { m.kept.Set(float64(n)) }

// Show publishes what is known.
func (m *Metrics) Show(s *state.State) {
	for _, kind := range []state.Kind{state.KindServer, state.KindGateway} {
		for _, h := range []state.Health{state.Passing, state.Critical} {
			m.entries.WithLabelValues(string(kind), string(h)).Set(float64(s.Count(kind, h)))
		}
	}
	m.index.Set(float64(s.Index()))
}
