package test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/test/lab"
)

// dial connects from a member's host to another's advertised gossip port, as
// its server does.
func (m *member) dial(to *member) error {
	c, err := m.host.Dial("tcp", netip.AddrPortFrom(to.advertise, 7946).String())
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	// Whoever is not there is told by a reset, which may come after the
	// endpoint has taken the connection. An agent says nothing unasked.
	if err := c.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s to %s: %w", m.node, to.node, err)
	}
	return nil
}

// refused makes sure that a connection is refused at once.
func (m *member) refused(to *member) error {
	began := time.Now()
	err := m.dial(to)
	took := time.Since(began)
	switch {
	case err == nil:
		return fmt.Errorf("%s reaches %s", m.node, to.node)
	case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%s is not refused by %s: %w", m.node, to.node, err)
	case took > 400*time.Millisecond:
		return fmt.Errorf("%s waits %v for a refusal by %s", m.node, took, to.node)
	}
	return nil
}

func (s *states) in(dcs ...string) []*member {
	var out []*member
	for _, m := range s.members {
		if slices.Contains(dcs, m.dc) {
			out = append(out, m)
		}
	}
	return out
}

// Servers come, say farewell, and die.
func TestFederationFollowsServers(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 1}, lab.Size{Hosts: 1, Gateways: 1}, lab.Size{Hosts: 2, Gateways: 1})
	s.begin()
	s.awaitAlive()
	others := s.in("dc1", "dc2")

	s.All[2].AddHost()
	added := s.addMember(s.All[2])
	began := time.Now()
	added.start()
	for _, m := range others {
		lab.Eventually(t, 5*time.Second, func() error { return m.dial(added) })
	}
	t.Logf("a server that was added is reached from everywhere %v after its sidecar's start", time.Since(began))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}

	began = time.Now()
	out, err := added.host.Run(lab.Culvert(t), "federation", "leave", "--config", "sidecar.hcl")
	if err != nil || !strings.Contains(out, "has left the federation") {
		t.Fatalf("culvert federation leave: %v\n%s", err, out)
	}
	for _, m := range s.members {
		if m == added {
			continue
		}
		lab.Eventually(t, 5*time.Second, func() error {
			if m.knows(added) == nil {
				return fmt.Errorf("%s still knows %s", m.node, added.node)
			}
			return nil
		})
		if err := m.refused(added); err != nil { // nobody has its address any more
			t.Error(err)
		}
	}
	t.Logf("after its farewell its endpoints are gone everywhere after %v", time.Since(began))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	if !added.sidecar.Status().Federation.Left {
		t.Error("the sidecar that has left does not say so")
	}
	s.members = s.members[:len(s.members)-1]

	victim := s.in("dc3")[1]
	began = time.Now()
	victim.sidecar.Kill()
	victim.agent.Kill()
	for _, m := range others {
		lab.Eventually(t, 35*time.Second-time.Since(began), func() error {
			p, err := m.peerStatus(victim)
			if err == nil && !p.Critical {
				err = fmt.Errorf("%s does not say that %s is critical", m.node, victim.node)
			}
			return err
		})
		if err := m.refused(victim); err != nil {
			t.Error(err)
		}
	}
	t.Logf("a server that was killed is critical everywhere after %v, and refused at once", time.Since(began))
	victim.sidecar.Again()
	for _, m := range others {
		lab.Eventually(t, 10*time.Second, func() error {
			p, err := m.peerStatus(victim)
			if err == nil && p.Critical {
				err = fmt.Errorf("%s says that %s is critical", m.node, victim.node)
			}
			return err
		})
	}
}

// All gateways of a datacenter get new addresses at once.
func TestFederationGatewaysAreReplaced(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 2}, lab.Size{Hosts: 1, Gateways: 2}, lab.Size{Hosts: 1, Gateways: 1})
	s.byName()
	s.begin()
	s.awaitAlive()
	for _, site := range s.All[:2] {
		s.replaceGateways(site)
	}
}

// byName has the secondaries know the primary's gateways by a name.
func (s *states) byName() {
	s.primary = []string{"gw.dc1.example:8443"}
	for _, m := range s.members {
		m.config = s.memberConfig(s.siteOf(m.dc), m)
	}
	for _, d := range s.doors {
		d.config = s.doorConfig(s.siteOf(d.dc), d)
	}
	s.point(s.All[0].Gateways...)
}

// point makes the name stand for gateways.
func (s *states) point(to ...*lab.WideGateway) {
	var lines []string
	for _, g := range to {
		lines = append(lines, g.WAN.String()+" gw.dc1.example")
	}
	for _, m := range s.members {
		m.host.Names(lines...)
	}
	for _, d := range s.doors {
		d.host.Names(lines...)
	}
}

func (s *states) siteOf(dc string) *lab.WideSite {
	return s.All[slices.IndexFunc(s.All, func(w *lab.WideSite) bool { return w.Name == dc })]
}

// replaceGateways kills a site's gateways, starts as many on other addresses,
// and waits until the federation has repaired itself: what is new in the site is
// known everywhere, what is new elsewhere is known there, and everybody reaches
// everybody.
func (s *states) replaceGateways(site *lab.WideSite) {
	s.t.Helper()
	old := 0
	for _, d := range s.doors {
		if d.dc == site.Name {
			d.daemon.Kill()
			old++
		}
	}
	var fresh []*lab.WideGateway
	for range old {
		fresh = append(fresh, site.AddGateway())
		d := s.addDoor(site)
		d.host.Names()
		if site == s.All[0] {
			s.point(fresh...)
		}
		d.start()
	}
	if site == s.All[0] {
		s.point(fresh...)
	}
	began := time.Now()
	left := func() time.Duration { return 60*time.Second - time.Since(began) }
	var known []*member
	for _, at := range s.All {
		host := at.AddHost()
		if site == s.All[0] || at == s.All[0] {
			host.Names()
		}
		known = append(known, s.addMember(at))
	}
	s.point(s.All[0].Gateways[len(s.All[0].Gateways)-old:]...)
	for _, m := range known {
		m.start()
	}
	s.allKnown(left())
	for _, from := range s.members {
		for _, to := range s.members {
			if from.dc != to.dc {
				lab.Eventually(s.t, left(), func() error { return from.dial(to) })
			}
		}
	}
	s.t.Logf("%s: repaired %v after its gateways were replaced", site.Name, time.Since(began))
}

// The same with redirect: what is for a server that is dead stays here.
func TestFederationWithRedirect(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := (&states{t: t, redirect: true}).build([]lab.Size{{Hosts: 1, Gateways: 1}, {Hosts: 1, Gateways: 1}, {Hosts: 1, Gateways: 1}})
	s.begin()
	s.awaitAlive()
	victim := s.in("dc3")[0]
	began := time.Now()
	victim.sidecar.Kill()
	victim.agent.Kill()
	for _, m := range s.in("dc1", "dc2") {
		lab.Eventually(t, 35*time.Second-time.Since(began), func() error {
			p, err := m.peerStatus(victim)
			if err == nil && !p.Critical {
				err = fmt.Errorf("%s does not say that %s is critical", m.node, victim.node)
			}
			return err
		})
		for range 5 {
			if err := m.refused(victim); err != nil {
				t.Error(err)
			}
			c, err := m.host.Dial("udp", netip.AddrPortFrom(victim.advertise, 7946).String())
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Write([]byte("nobody is to see this"))
			_ = c.Close()
			if err != nil {
				t.Error(err)
			}
		}
	}
	out, err := s.in("dc1")[0].host.Run(lab.Culvert(t), "federation", "remove", "dc3/"+victim.node, "--config", "sidecar.hcl")
	if err != nil {
		t.Fatalf("culvert federation remove: %v\n%s", err, out)
	}
	for _, m := range s.in("dc1", "dc2") {
		lab.Eventually(t, 5*time.Second, func() error {
			if m.knows(victim) == nil {
				return fmt.Errorf("%s still knows %s", m.node, victim.node)
			}
			return nil
		})
		if err := m.refused(victim); err != nil {
			t.Errorf("after it was removed: %v", err)
		}
	}
	if n := s.SentPlainly(); n != 0 {
		t.Errorf("%d packets were sent plainly", n)
	}
}
