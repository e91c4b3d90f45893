package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/sidecar"
	"culvert/test/lab"
)

// soak is how long the primary is away. `make soak` makes it five minutes: the
// test then outlasts every limit on what is idle.
func soak(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("CULVERT_SOAK")
	if text == "" {
		return 45 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("CULVERT_SOAK: %v", err)
	}
	return d
}

// The primary is away: what works goes on, and secondaries start again from what
// is on their disks.
func TestFederationWithoutItsPrimary(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 1}, lab.Size{Hosts: 2, Gateways: 1}, lab.Size{Hosts: 1, Gateways: 1})
	s.begin()
	s.awaitAlive()
	rest := s.in("dc2", "dc3")
	began := time.Now()
	var gone []interface{ Again() }
	for _, m := range s.in("dc1") {
		m.sidecar.Kill()
		gone = append(gone, m.sidecar)
	}
	for _, d := range s.doors {
		if d.dc == "dc1" {
			d.daemon.Kill()
			gone = append(gone, d.daemon)
		}
	}

	check := func() {
		t.Helper()
		for _, m := range rest {
			seen, err := m.agent.Members()
			if err != nil {
				t.Fatal(err)
			}
			for _, other := range rest {
				if seen[other.node] != "alive" {
					t.Errorf("%v after the primary has gone %s sees %s %s", time.Since(began), m.node, other.node, seen[other.node])
				}
				if other != m {
					if err := m.dial(other); err != nil {
						t.Errorf("%v after the primary has gone: %v", time.Since(began), err)
					}
				}
			}
		}
	}
	away := soak(t)
	check()
	lab.Wait(away / 3)
	check()

	// A secondary starts again.
	again := rest[0]
	again.sidecar.Stop()
	restarted := time.Now()
	again.sidecar.Again()
	again.sidecar.AwaitReady()
	for _, other := range s.members {
		if other != again {
			if err := again.knows(other); err != nil {
				t.Errorf("right after its start: %v", err)
			}
		}
	}
	for _, d := range s.doors {
		if d.dc == "dc2" {
			d.daemon.Stop()
			d.daemon.Again()
			d.daemon.AwaitReady() // its routes come from the disk too
		}
	}
	lab.Eventually(t, 10*time.Second, func() error { return errors.Join(again.dial(rest[2]), rest[2].dial(again)) })
	t.Logf("a sidecar and a gateway of a secondary are back %v after their start, with all peers", time.Since(restarted))
	for time.Since(began) < away {
		lab.Wait(min(10*time.Second, away/4))
		check()
	}

	for _, p := range gone {
		p.Again()
	}
	back := time.Now()
	for _, m := range rest {
		lab.Eventually(t, 20*time.Second, func() error {
			st, err := m.status()
			if err == nil && (st.Federation.Contact == nil || st.Federation.Contact.Before(back)) {
				err = fmt.Errorf("%s has not heard of the primary: %s", m.node, st.Federation.LastError)
			}
			return err
		})
	}
	t.Logf("the primary was away for %v; its return is noticed after %v", back.Sub(began), time.Since(back))
	for _, m := range s.members {
		lab.Eventually(t, converge, func() error { return m.agent.Sees("alive", s.nodes()...) })
	}
}

// What is replicated does not win over what is configured: a sidecar that comes
// back with dead addresses for every gateway finds the primary all the same.
func TestFederationConfiguredAddressesWin(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 2}, lab.Size{Hosts: 1, Gateways: 2})
	s.begin()
	s.awaitAlive()
	m := s.in("dc2")[0]
	reached := func() error {
		st, err := m.status()
		if err == nil && st.Federation.Contact == nil {
			err = fmt.Errorf("the primary is not reached: %s", st.Federation.LastError)
		}
		return err
	}

	s.poison(m)
	began := time.Now()
	m.sidecar.Again()
	lab.Eventually(t, 15*time.Second, reached)
	t.Logf("the primary is reached %v after a start with dead addresses", time.Since(began))
	lab.Eventually(t, 30*time.Second, func() error { return errors.Join(m.dial(s.in("dc1")[0]), s.in("dc1")[0].dial(m)) })

	// Once more with nobody there at first, so that the dead ones are seen to be
	// loaded and tried before the primary answers and puts them right.
	var doors []*door
	for _, d := range s.doors {
		if d.dc == "dc1" {
			doors = append(doors, d)
			d.daemon.Stop()
		}
	}
	dead := s.poison(m)
	m.sidecar.Again()
	lab.Eventually(t, 15*time.Second, func() error {
		st, err := m.status()
		if err != nil {
			return err
		}
		for _, one := range dead {
			i := slices.IndexFunc(st.Gateways, func(g sidecar.GatewayStatus) bool { return g.Address == one })
			if i < 0 || st.Gateways[i].LastError == "" {
				return fmt.Errorf("%s was not loaded, or not tried: %+v", one, st.Gateways)
			}
		}
		return nil
	})
	began = time.Now()
	for _, d := range doors {
		d.daemon.Again()
	}
	lab.Eventually(t, 15*time.Second, reached)
	t.Logf("with %s tried in vain, it is reached %v after its gateways are there", strings.Join(dead, ", "), time.Since(began))
}

// poison stops a member's sidecar and makes every gateway that it has kept on disk
// one that is not there. It returns those that the sidecar may dial.
func (s *states) poison(m *member) (dead []string) {
	s.t.Helper()
	file := filepath.Join(m.host.Dir, "state", "federation-states.json")
	lab.Eventually(s.t, 15*time.Second, func() error {
		text, err := os.ReadFile(file)
		for _, d := range s.doors {
			if err == nil && !bytes.Contains(text, []byte(lab.HostPort(d.host.WAN, 8443))) {
				err = fmt.Errorf("%s is not in %s", d.host.WAN, file)
			}
		}
		return err
	})
	m.sidecar.Stop()
	text, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	for i, d := range s.doors {
		wan, lan := fmt.Sprintf("10.79.250.%d:8443", i+1), fmt.Sprintf("10.72.0.%d:8443", 240+i)
		for was, is := range map[string]string{lab.HostPort(d.host.WAN, 8443): wan, lab.HostPort(d.host.Addr, 8443): lan} {
			if !bytes.Contains(text, []byte(`"`+was+`"`)) {
				s.t.Fatalf("%s is not in %s", was, text)
			}
			text = bytes.ReplaceAll(text, []byte(`"`+was+`"`), []byte(`"`+is+`"`))
		}
		dead = append(dead, map[bool]string{true: lan, false: wan}[d.dc == m.dc])
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return dead
}
