package test

import (
	"testing"
	"time"

	"culvert/test/lab"
)

// What the other tests rely on: the guard counts what it should not let pass,
// there is no way around the gateways, and faults are faults.
func TestLab(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	n := lab.TwoSites(t, lab.Options{HostsA: 1, HostsB: 1})
	guard := n.Guard()
	a, b := n.Sites[0], n.Sites[1]
	send := func(port int) {
		c, err := a.Gateway.Dial("udp", lab.HostPort(b.WAN, port))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("x")) // dropped on its way out: EPERM
		_ = c.Close()
	}
	send(8443)
	send(7946)
	if passed, dropped := guard.Counts(); passed != 0 || dropped != 2 {
		t.Errorf("after two datagrams %d packets passed and %d were dropped, want 0 and 2", passed, dropped)
	}
	if _, err := a.Hosts[0].Dial("tcp", lab.HostPort(b.Hosts[0].Addr, 8443)); err == nil {
		t.Error("there is a way between the sites")
	}

	ln, err := b.Gateway.Listen(lab.HostPort(b.WAN, 8443))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	reach := func() error {
		c, err := a.Gateway.Dial("tcp", lab.HostPort(b.WAN, 8443))
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	if err := reach(); err != nil {
		t.Errorf("the WAN link: %v", err)
	}
	for _, fault := range []struct {
		name       string
		begin, end func()
	}{{"link down", n.Cut, n.Mend}, {"silence", n.Swallow, n.Return}} {
		fault.begin()
		if err := reach(); err == nil {
			t.Errorf("%s: the far side is reached", fault.name)
		}
		fault.end()
		lab.Eventually(t, 10*time.Second, reach)
	}
}
