package gateway

import (
	"slices"
	"testing"

	"culvert/config"
	"culvert/federation"
	"culvert/locator"
)

// Records add to the routes of the configuration, and take nothing away.
func TestRoutesOfRecords(t *testing.T) {
	cfg := &config.Gateway{
		Datacenter: "dc2", Node: "gw", Domain: "consul",
		Sidecars:    []config.GatewaySidecar{{Node: "bob", Address: "10.72.0.11:8443"}},
		Datacenters: []config.Datacenter{{Name: "dc3", Gateways: []string{"gw.dc3.example:8443"}}},
		Federation:  &config.Federation{PrimaryDatacenter: "dc1", PrimaryGateways: []string{"gw.dc1.example:8443"}},
	}
	view := &federation.View{
		Peers: []federation.Peer{
			{Datacenter: "dc2", Node: "ben", Address: "10.72.0.12:8443"},
			{Datacenter: "dc2", Node: "bob", Address: "10.72.0.99:8443"}, // the configuration knows better
			{Datacenter: "dc3", Node: "carol", Address: "10.73.0.11:8443"},
		},
		Datacenters: map[string][]string{
			"dc1": {"203.0.113.1:8443", "gw.dc1.example:8443"},
			"dc3": {"203.0.113.3:8443"},
			"dc4": {},
		},
	}
	r := newRoutes(cfg, view)
	own := func(addresses ...string) []locator.Endpoint { return locator.Configured(addresses...) }
	for name, want := range map[string][]locator.Endpoint{
		"bob.server.dc2.consul":   own("10.72.0.11:8443"),
		"ben.server.dc2.consul":   own("10.72.0.12:8443"), // records of the own datacenter lead into its own network
		"server.dc2.consul":       own("10.72.0.11:8443", "10.72.0.12:8443"),
		"server.dc1.consul":       {{Address: "gw.dc1.example:8443"}, {Address: "203.0.113.1:8443", Replicated: true}},
		"alice.server.dc1.consul": {{Address: "gw.dc1.example:8443"}, {Address: "203.0.113.1:8443", Replicated: true}},
		"carol.server.dc3.consul": {{Address: "gw.dc3.example:8443"}, {Address: "203.0.113.3:8443", Replicated: true}},
	} {
		key, ok := r.find(name)
		if got := r.backends[key]; !ok || !slices.Equal(got, want) {
			t.Errorf("%s leads to %v, %v, want %v", name, got, ok, want)
		}
	}
	for _, name := range []string{"dave.server.dc4.consul", "eve.server.dc2.consul", "server.dc5.consul"} {
		if key, ok := r.find(name); ok {
			t.Errorf("%s leads to %v", name, r.backends[key])
		}
	}
	want := []string{"10.72.0.11:8443", "gw.dc1.example:8443", "gw.dc3.example:8443"}
	if got := r.addresses(); !slices.Equal(got, want) {
		t.Errorf("configured addresses are %v, want %v", got, want)
	}

	// In the primary any sidecar that is named leads to the store.
	cfg = &config.Gateway{
		Datacenter: "dc1", Node: "gw", Domain: "consul",
		Federation: &config.Federation{PrimaryDatacenter: "dc1", RetryJoin: []string{"10.71.0.11:8443", "10.71.0.12:8443"}},
	}
	r = newRoutes(cfg, &federation.View{})
	key, ok := r.find("server.dc1.consul")
	if got := r.backends[key]; !ok || !slices.Equal(got, own("10.71.0.11:8443", "10.71.0.12:8443")) {
		t.Errorf("server.dc1.consul leads to %v, %v", got, ok)
	}
	if _, ok := r.find("alice.server.dc1.consul"); ok {
		t.Error("a node is known before there is a record of it")
	}
}
