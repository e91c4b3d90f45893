package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"culvert/federation/state"
	"culvert/sidecar"
	"culvert/test/lab"
)

// What follows is a federation that finds itself: nobody is told a peer.

// A member is one server of such a federation.
type member struct {
	dc, node  string
	host      *lab.Host
	advertise netip.Addr
	config    string
	agent     *lab.SerfAgent
	sidecar   *lab.Daemon
}

// A door is one gateway of such a federation.
type door struct {
	dc, name string
	host     *lab.WideGateway
	config   string
	daemon   *lab.Daemon
}

// states is a federation that finds itself.
type states struct {
	*lab.Sites
	t       *testing.T
	pki     *lab.PKI
	members []*member
	doors   []*door
	primary []string // WAN addresses of the primary's gateways, or their name

	redirect bool // servers have their real addresses and listen on all
}

// newStates builds the network and the configurations of a federation whose
// primary is the first site, and starts nothing but the agents. Of the sidecars of
// the primary three begin the store if there are as many, and otherwise the first
// begins it and the others join.
func newStates(t *testing.T, sizes ...lab.Size) *states {
	t.Helper()
	return (&states{t: t}).build(sizes)
}

func (s *states) build(sizes []lab.Size) *states {
	s.t.Helper()
	s.Sites, s.pki = lab.ManySites(s.t, sizes...), lab.NewPKI(s.t, "consul")
	for _, g := range s.All[0].Gateways {
		s.primary = append(s.primary, lab.HostPort(g.WAN, 8443))
	}
	for _, site := range s.All {
		for range site.Hosts {
			s.addMember(site)
		}
		for range site.Gateways {
			s.addDoor(site)
		}
	}
	return s
}

// addMember makes a server of the next host of a site that has none.
func (s *states) addMember(site *lab.WideSite) *member {
	s.t.Helper()
	n := 0
	for _, m := range s.members {
		if m.dc == site.Name {
			n++
		}
	}
	m := &member{dc: site.Name, node: fmt.Sprintf("%s-s%d", site.Name, n+1), host: site.Hosts[n]}
	m.advertise = virtual(false, s.number(site), n+1)
	if s.redirect {
		m.advertise = m.host.Addr
		m.agent = m.host.StartUncaptured(m.node)
	} else {
		m.agent = m.host.StartSerf(m.node, m.host.Addr, m.advertise, "")
	}
	m.config = s.memberConfig(site, m)
	s.members = append(s.members, m)
	return m
}

func (s *states) number(site *lab.WideSite) int {
	for i, one := range s.All {
		if one == site {
			return i + 1
		}
	}
	return 0
}

// addDoor makes a gateway of the next gateway host of a site that has none.
func (s *states) addDoor(site *lab.WideSite) *door {
	s.t.Helper()
	n := 0
	for _, d := range s.doors {
		if d.dc == site.Name {
			n++
		}
	}
	d := &door{dc: site.Name, name: fmt.Sprintf("gw%d", n+1), host: site.Gateways[n]}
	d.config = s.doorConfig(site, d)
	s.doors = append(s.doors, d)
	return d
}

func quoted(all []string) string { return `["` + strings.Join(all, `", "`) + `"]` }

// bootstrap is what a sidecar of the primary is told.
func (s *states) bootstrap(m *member) string {
	hosts := s.All[0].Hosts
	var others []string
	for _, h := range hosts[:min(3, len(hosts))] {
		if h != m.host {
			others = append(others, lab.HostPort(h.Addr, 8443))
		}
	}
	switch {
	case len(hosts) >= 3 && len(others) == 2:
		return fmt.Sprintf("bootstrap_expect = 3\nretry_join = %s\n", quoted(others))
	case m.host == hosts[0]:
		return ""
	}
	return fmt.Sprintf("bootstrap_expect = 0\nretry_join = %s\n", quoted(others))
}

func (s *states) memberConfig(site *lab.WideSite, m *member) string {
	way := fmt.Sprintf("primary_gateways = %s\n", quoted(s.primary))
	if site == s.All[0] {
		way = s.bootstrap(m)
	}
	return fmt.Sprintf(`datacenter = %q
node       = %q
server {
  profile   = "serf"
  address   = %q
  advertise = %q
}
capture = %q
listen { address = %q }
log { level = "debug" }
federation {
primary_datacenter = "dc1"
data_dir = "state"
address  = %[6]q
%s}
%s`, m.dc, m.node, m.host.Addr, m.advertise, map[bool]string{true: "redirect", false: "bind"}[s.redirect], lab.HostPort(m.host.Addr, 8443), way, s.pki.Server(m.dc, m.node, "consul"))
}

func (s *states) doorConfig(site *lab.WideSite, d *door) string {
	way := fmt.Sprintf("primary_gateways = %s\n", quoted(s.primary))
	if site == s.All[0] {
		var join []string
		for _, h := range site.Hosts[:min(3, len(site.Hosts))] {
			join = append(join, lab.HostPort(h.Addr, 8443))
		}
		way = fmt.Sprintf("retry_join = %s\n", quoted(join))
	}
	return fmt.Sprintf(`datacenter = %q
node       = %q
listen { address = "0.0.0.0:8443" }
log { level = "debug" }
federation {
primary_datacenter = "dc1"
address     = %q
wan_address = %q
data_dir    = "state"
%s}
%s`, d.dc, d.name, lab.HostPort(d.host.Addr, 8443), lab.HostPort(d.host.WAN, 8443), way, s.pki.Gateway(d.dc, d.name, "consul"))
}

func (m *member) start() { m.sidecar = m.host.BeginCulvert("sidecar", m.config) }
func (d *door) start()   { d.daemon = d.host.BeginCulvert("gateway", d.config) }

// begin starts everything that is not running yet.
func (s *states) begin() {
	s.t.Helper()
	for _, d := range s.doors {
		if d.daemon == nil {
			d.start()
		}
	}
	for _, m := range s.members {
		if m.sidecar == nil {
			m.start()
		}
	}
}

// nodes are the names of all servers.
func (s *states) nodes() []string {
	var out []string
	for _, m := range s.members {
		out = append(out, m.node)
	}
	return out
}

// allKnown waits until each sidecar has every other server as a peer.
func (s *states) allKnown(limit time.Duration) {
	s.t.Helper()
	lab.Eventually(s.t, limit, func() error {
		var lacks []error
		for _, m := range s.members {
			for _, other := range s.members {
				if m != other {
					lacks = append(lacks, m.knows(other))
				}
			}
		}
		return errors.Join(lacks...)
	})
}

// allRegistered waits until everybody has an entry in the store.
func (s *states) allRegistered(limit time.Duration) {
	s.t.Helper()
	lab.Eventually(s.t, limit, func() error {
		_, body, err := s.members[0].sidecar.Get("/v1/federation-states")
		if err != nil {
			return err
		}
		var records []state.Record
		if err := json.Unmarshal(body, &records); err != nil {
			return err
		}
		entries := 0
		for _, r := range records {
			entries += len(r.Servers) + len(r.Gateways)
		}
		if want := len(s.members) + len(s.doors); entries != want {
			return fmt.Errorf("%d entries are registered, want %d", entries, want)
		}
		return nil
	})
}

func (m *member) knows(other *member) error {
	_, err := m.peerStatus(other)
	return err
}

// status is what a member's sidecar says, which may still be starting.
func (m *member) status() (sidecar.Status, error) {
	var st sidecar.Status
	_, body, err := m.sidecar.Get("/v1/status")
	if err == nil {
		err = json.Unmarshal(body, &st)
	}
	return st, err
}

// peerStatus is what a member's sidecar says of another server.
func (m *member) peerStatus(other *member) (sidecar.PeerStatus, error) {
	st, err := m.status()
	if err != nil {
		return sidecar.PeerStatus{}, err
	}
	for _, p := range st.Peers {
		if p.Node == other.node && p.Datacenter == other.dc {
			return p, nil
		}
	}
	return sidecar.PeerStatus{}, fmt.Errorf("%s does not know %s", m.node, other.node)
}

// joinAll makes every agent join one of each datacenter.
func (s *states) joinAll() {
	s.t.Helper()
	for _, m := range s.members {
		for _, to := range s.members {
			if to != m && strings.HasSuffix(to.node, "-s1") {
				if _, err := m.agent.Do("join", to.advertise.String()); err != nil {
					s.t.Logf("%s joins %s: %v", m.node, to.node, err)
				}
			}
		}
	}
}

// awaitAlive waits until every server sees every other alive, for half a minute at
// most. Agents do not join again by themselves: those whose join came too early
// are told again.
func (s *states) awaitAlive() time.Duration {
	s.t.Helper()
	const limit = 30 * time.Second
	began := time.Now()
	s.allKnown(limit)
	for left := 1; left > 0; {
		left = 0
		for _, m := range s.members {
			if m.agent.Sees("alive", s.nodes()...) != nil {
				left++
			}
		}
		if left > 0 && time.Since(began) > limit {
			s.t.Fatalf("%d of %d servers do not see all others after %v", left, len(s.members), limit)
		}
		if left > 0 {
			s.joinAll()
			lab.Wait(500 * time.Millisecond)
		}
	}
	return time.Since(began)
}

// Whatever starts first, everything finds everything: with the first seed the
// secondaries are there twenty seconds before the primary.
func TestFederationFindsItself(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	for seed := range uint64(5) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			s := newStates(t, lab.Size{Hosts: 3, Gateways: 2}, lab.Size{Hosts: 3, Gateways: 2}, lab.Size{Hosts: 1, Gateways: 1})
			type starter struct {
				dc    string
				start func()
			}
			var order []starter
			for _, m := range s.members {
				order = append(order, starter{m.dc, m.start})
			}
			for _, d := range s.doors {
				order = append(order, starter{d.dc, d.start})
			}
			random := rand.New(rand.NewPCG(seed, 1))
			random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			var late []starter
			for _, one := range order {
				if seed == 0 && one.dc == "dc1" {
					late = append(late, one)
					continue
				}
				one.start()
				lab.Wait(time.Duration(random.IntN(300)) * time.Millisecond)
			}
			if seed == 0 {
				lab.Wait(20 * time.Second)
				for _, one := range late {
					one.start()
				}
			}
			took := s.awaitAlive()
			t.Logf("all %d servers see each other alive %v after the last start", len(s.members), took)
		})
	}
}
