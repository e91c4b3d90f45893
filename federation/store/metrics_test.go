package store

import (
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"culvert/federation/state"
)

func TestMetrics(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.add("alice", 1)
		reg := prometheus.NewRegistry()
		n.o.Metrics = NewMetrics(reg)
		n.start()
		register(t, numbered(1), n)
		register(t, numbered(1), n)
		register(t, state.Registration{Datacenter: "dc2", Gateway: &state.Gateway{
			Name: "gw", Address: "10.0.0.1:1", WANAddress: "10.0.0.1:1", Process: state.Process{Start: "1"},
		}}, n)
		bad := numbered(2)
		bad.Datacenter = "No"
		if _, err := n.store.Register(t.Context(), bad); err == nil {
			t.Error("it was registered")
		}
		thief := numbered(3)
		thief.Server.Advertise = numbered(1).Server.Advertise
		_, _ = n.store.Register(t.Context(), thief)
		sleep(2 * time.Second)
		want := `
# HELP culvert_federation_store_entries Entries in the store, by kind (servers, gateways) and health (passing, critical).
# TYPE culvert_federation_store_entries gauge
culvert_federation_store_entries{health="critical",kind="gateways"} 0
culvert_federation_store_entries{health="critical",kind="servers"} 0
culvert_federation_store_entries{health="passing",kind="gateways"} 1
culvert_federation_store_entries{health="passing",kind="servers"} 1
# HELP culvert_federation_store_leader 1 while this sidecar leads the store, else 0.
# TYPE culvert_federation_store_leader gauge
culvert_federation_store_leader 1
# HELP culvert_federation_store_peers Members of the store's raft group, this one included, by suffrage (voter, nonvoter).
# TYPE culvert_federation_store_peers gauge
culvert_federation_store_peers{suffrage="nonvoter"} 0
culvert_federation_store_peers{suffrage="voter"} 1
`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "culvert_federation_store_entries",
			"culvert_federation_store_leader", "culvert_federation_store_peers"); err != nil {
			t.Error(err)
		}
		for result, n := range map[string]float64{writeOK: 2, writeUnchanged: 1, writeInvalid: 1, writeConflict: 1, writeDisk: 0} {
			if have := testutil.ToFloat64(counter(t, reg, result)); have != n {
				t.Errorf("%v writes are %s, want %v", have, result, n)
			}
		}
	})
}

// counter reads one series back.
func counter(t *testing.T, reg *prometheus.Registry, result string) prometheus.Gauge {
	t.Helper()
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "copy", Help: "One series."})
	for _, f := range all {
		for _, m := range f.GetMetric() {
			if f.GetName() == "culvert_federation_store_writes_total" && m.GetLabel()[0].GetValue() == result {
				g.Set(m.GetCounter().GetValue())
			}
		}
	}
	return g
}

// What raft logs comes out as ours: its errors as warnings, not too often.
func TestHCLog(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	var l hclog.Logger = newHCLog(zap.New(core))
	l = l.Named("part").With("peer", "amy")
	for range 5 {
		l.Error("failed to heartbeat to", "format", hclog.Fmt("%d-%d", 1, 2), "odd")
	}
	l.Info("entering follower state")
	l.StandardLogger(nil).Print("plain")
	all := logs.All()
	if len(all) != 3 || all[0].Level != zapcore.WarnLevel || all[1].Level != zapcore.DebugLevel || all[0].LoggerName != "part" {
		t.Fatalf("logged %v", all)
	}
	if m := all[0].ContextMap(); m["peer"] != "amy" || m["format"] != "1-2" {
		t.Errorf("fields are %v", m)
	}
}
