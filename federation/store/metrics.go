package store

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"culvert/federation/state"
	"culvert/internal/pause"
)

// Metrics counts writes and shows what is stored.
type Metrics struct {
	index, leader, failing prometheus.Gauge
	entries, peers         *prometheus.GaugeVec
	writes                 *prometheus.CounterVec
	failures               prometheus.Counter
}

// The results of writes.
const (
	writeOK        = "ok"
	writeUnchanged = "unchanged"
	writeConflict  = "conflict"
	writeFull      = "full"
	writeInvalid   = "invalid"
	writeNotLeader = "not_leader"
	writeDisk      = "disk"
	writeFailed    = "failed"
)

// NewMetrics registers the package's metrics with reg; with a nil reg they are
// counted and shown nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &Metrics{
		index:   gauge("culvert_federation_store_index", "Index of the last change of the store."),
		leader:  gauge("culvert_federation_store_leader", "1 while this sidecar leads the store, else 0."),
		failing: gauge("culvert_federation_store_disk_failed", "1 while the store cannot write to its disk, else 0."),
		entries: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_federation_store_entries",
			Help: "Entries in the store, by kind (servers, gateways) and health (passing, critical).",
		}, []string{"kind", "health"}),
		peers: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "culvert_federation_store_peers",
			Help: "Members of the store's raft group, this one included, by suffrage (voter, nonvoter).",
		}, []string{"suffrage"}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_federation_store_writes_total",
			Help: "Registrations and removals, by result (ok, unchanged, conflict, full, invalid, not_leader, disk, failed).",
		}, []string{"result"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_federation_store_disk_failures_total",
			Help: "Times that the store has stopped, or could not begin, because its disk failed.",
		}),
	}
	for _, r := range []string{writeOK, writeUnchanged, writeConflict, writeFull, writeInvalid, writeNotLeader, writeDisk, writeFailed} {
		m.writes.WithLabelValues(r)
	}
	m.show(Status{}, state.New())
	if reg != nil {
		reg.MustRegister(m.index, m.leader, m.failing, m.entries, m.peers, m.writes, m.failures)
	}
	return m
}

func (m *Metrics) wrote(result string) { m.writes.WithLabelValues(result).Inc() }
func (m *Metrics) failed()             { m.failures.Inc() }

func (m *Metrics) show(status Status, st *state.State) {
	m.index.Set(float64(st.Index()))
	m.leader.Set(number(status.Leading))
	m.failing.Set(number(status.Error != ""))
	count := map[state.Kind]map[state.Health]int{state.KindServer: {}, state.KindGateway: {}}
	for _, r := range st.Records() {
		for i := range r.Servers {
			count[state.KindServer][r.Servers[i].Health]++
		}
		for i := range r.Gateways {
			count[state.KindGateway][r.Gateways[i].Health]++
		}
	}
	for kind, by := range count {
		for _, h := range []state.Health{state.Passing, state.Critical} {
			m.entries.WithLabelValues(string(kind), string(h)).Set(float64(by[h]))
		}
	}
	voting := 0
	for _, p := range status.Peers {
		if p.Voter {
			voting++
		}
	}
	m.peers.WithLabelValues("voter").Set(float64(voting))
	m.peers.WithLabelValues("nonvoter").Set(float64(len(status.Peers) - voting))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// observe keeps the gauges.
func (s *Store) observe(ctx context.Context) {
	for {
		s.metrics.show(s.Status(), s.State())
		if !pause.For(ctx, time.Second) {
			return
		}
	}
}
