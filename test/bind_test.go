package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/test/lab"
)

// converge is how long gossip has to settle.
const converge = 30 * time.Second

// The main job: servers in two datacenters without a route between them see,
// reach, tell and ask each other; only TLS on port 8443 crosses the WAN link.
func TestBindIPv4(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	testBind(t, settings{hosts: [2]int{2, 2}})
}

func TestBindIPv6(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	testBind(t, settings{hosts: [2]int{2, 2}, ipv6: true})
}

func TestBindThreeAndOne(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	testBind(t, settings{hosts: [2]int{3, 1}})
}

func testBind(t *testing.T, s settings) {
	s.agentJSON = `{"event_handlers": ["query:who=echo $SERF_SELF_NAME", "user:told=cat > told"]}`
	s.watched = true
	f := newFederation(t, s)
	for _, site := range f.Sites {
		if out, err := site.Gateway.Run("cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"); err != nil || strings.TrimSpace(out) != "0\n0" {
			t.Fatalf("the gateway host of %s forwards: %q, %v", site.Name, out, err)
		}
	}
	f.join()

	f.reachEachOther()

	passed, dropped := f.guard.Counts()
	if passed == 0 || dropped != 0 {
		t.Errorf("on the WAN link %d packets passed and %d were dropped, want some and none", passed, dropped)
	}
	f.tap.Check(t, 0x16)
	t.Logf("%v: %d packets crossed the WAN link", f.Network, passed)

	// The control: without sidecars there is no way.
	first, last := f.servers[0], f.servers[len(f.servers)-1]
	for _, one := range f.servers {
		one.sidecar.Stop()
		if _, err := one.agent.Do("leave"); err != nil {
			t.Logf("leave: %v", err)
		}
	}
	fresh := first.host.StartSerf("fresh", first.host.Addr, first.advertise, "")
	if out, err := fresh.Do("join", last.advertise.String()); err == nil {
		t.Errorf("serf join succeeds without sidecars: %s", out)
	}
}

// reachEachOther checks what an operator of servers would: each reaches all,
// tells all and asks all, and knows how far it is. The agents' handlers keep what
// they were told in a file.
func (f *federation) reachEachOther() {
	f.t.Helper()
	for _, one := range f.servers {
		lab.Eventually(f.t, converge, func() error {
			acks, err := one.agent.Acks()
			if err == nil && len(acks) != len(f.servers) {
				err = fmt.Errorf("%s has acks of %v, want of all %d", one.node, acks, len(f.servers))
			}
			return err
		})
	}

	first := f.servers[0]
	if _, err := first.agent.Do("event", "told", "the news"); err != nil {
		f.t.Fatal(err)
	}
	for _, one := range f.servers {
		lab.Eventually(f.t, converge, func() error {
			got, err := os.ReadFile(filepath.Join(one.host.Dir, "told"))
			if err == nil && strings.TrimSpace(string(got)) != "the news" {
				err = fmt.Errorf("%s was told %q", one.node, got)
			}
			return err
		})
	}

	lab.Eventually(f.t, converge, func() error {
		answers, err := first.agent.Query("who")
		if err != nil {
			return err
		}
		for _, one := range f.servers {
			if answers[one.node] != one.node {
				return fmt.Errorf("the query was answered by %v", answers)
			}
		}
		return nil
	})

	last := f.servers[len(f.servers)-1]
	lab.Eventually(f.t, converge, func() error {
		out, err := first.agent.Do("rtt", last.node)
		if err == nil && !strings.Contains(out, "rtt:") {
			err = fmt.Errorf("serf rtt says %q", out)
		}
		return err
	})
}
