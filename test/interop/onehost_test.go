package interop

import (
	"testing"

	"culvert/test/lab"
)

// In each of two datacenters a Consul server and a Nomad server share a host. Each
// has a sidecar of its own, with a certificate of a CA of its own, and one gateway
// serves both.
func TestOneHostRedirect(t *testing.T) { require(t); testOneHost(t, way{redirect: true}) }
func TestOneHostBind(t *testing.T)     { require(t); testOneHost(t, way{}) }

func testOneHost(t *testing.T, w way) {
	f := newFederation(t, w, lab.Options{HostsA: 2, HostsB: 2}, [2]int{1, 1}, consulKind, nomadKind)
	c, n := &consulFederation{federation: f}, &nomadFederation{federation: f}
	c.startAgents()
	n.startAgents(0)
	c.seeEachOther()
	n.seeEachOther()
	c.keys()
	n.askEachOther()
	n.runJobs("before")

	// What one sidecar does is no matter of the other's server.
	for _, s := range f.servers {
		s.sidecar.Stop()
		if s.Kind == consulKind {
			n.seeEachOther()
			n.askEachOther()
		} else {
			c.seeEachOther()
			c.keys()
		}
		s.sidecar.Again()
		s.sidecar.AwaitReady()
		// Its server's next call finds that the connection it had is gone.
		all(t, settle, c.agents, func(a *consul) error { return c.answers(a, 1-a.at, settle) })
		t.Logf("without the sidecar of %s for %s the other server of its host was reached as before", s.Node, s.Kind.Profile)
	}
	c.seeEachOther()
	n.seeEachOther()
	c.keys()
	n.askEachOther()
	n.runJobs("after")
	f.wantTLSAlone()
}
