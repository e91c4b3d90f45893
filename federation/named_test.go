package federation

import (
	"testing"

	"culvert/certs"
)

// The hosts of URLs are servers' names, which have no port of their own, or
// addresses.
func TestNamed(t *testing.T) {
	for address, want := range map[string]certs.Identity{
		"server.dc1.consul:443":       {Datacenter: "dc1", Role: certs.RoleServer},
		"alice.server.dc1.consul:443": {Datacenter: "dc1", Node: "alice", Role: certs.RoleServer},
		"server.dc1.consul:8443":      {}, // a host's name in somebody's DNS
		"10.71.0.11:8443":             {},
		"10.71.0.11:443":              {},
		"gw.dc1.example:443":          {},
		"server.dc1.consul":           {},
		"[fd71::11]:443":              {},
	} {
		name, id, ok := Named(address, "consul")
		if ok != (want != certs.Identity{}) || ok && (id != want || name+":443" != address) {
			t.Errorf("%s: %q, %v, %v", address, name, id, ok)
		}
	}
}
