package locator

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts dials and probes and shows the health of endpoints. One value
// is shared by every pool of a process.
type Metrics struct {
	dials, probes *prometheus.CounterVec
	health        *prometheus.GaugeVec

	mu    sync.Mutex
	shown map[string]map[*endpoint]bool // by address: several pools may have it; whether it is healthy there
}

// NewMetrics registers the package's metrics with reg; with a nil reg they are
// counted and shown nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		shown: make(map[string]map[*endpoint]bool),
		dials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_locator_dials_total",
			Help: "TCP dials towards peers, by path (direct, local, remote, primary) and result (ok, failed).",
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
		for _, kind := range []string{KindDirect, KindLocal, KindRemote, KindPrimary} {
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

// show begins to publish an endpoint of a pool, healthy or not.
func (m *Metrics) show(e *endpoint, address string, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown[address] == nil {
		m.shown[address] = make(map[*endpoint]bool)
	}
	m.shown[address][e] = ok
	m.publish(address)
}

// healthy changes what show has begun, and nothing where hide has ended it.
func (m *Metrics) healthy(e *endpoint, address string, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, shown := m.shown[address][e]; shown {
		m.shown[address][e] = ok
		m.publish(address)
	}
}

// hide ends it. The address stays as long as another pool has it.
func (m *Metrics) hide(e *endpoint, address string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.shown[address], e)
	m.publish(address)
}

// publish shows an address as healthy if no pool says otherwise.
func (m *Metrics) publish(address string) {
	if len(m.shown[address]) == 0 {
		delete(m.shown, address)
		m.health.DeleteLabelValues(address)
		return
	}
	v := 1.0
	for _, ok := range m.shown[address] {
		if !ok {
			v = 0
		}
	}
	m.health.WithLabelValues(address).Set(v)
}
