package interop

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/test/lab"
)

// Two Nomad regions of three servers and a client each, as their project
// publishes them, see, ask and use each other.
func TestNomadRedirect(t *testing.T) { require(t); testNomad(t, way{redirect: true}, 0) }

// With bind a region's own raft rides the sidecars too.
func TestNomadBind(t *testing.T) { require(t); testNomad(t, way{}, 0) }

// Raft's budgets are wide enough for a sidecar's restart with a multiplier.
func TestNomadBindPatient(t *testing.T) { require(t); testNomad(t, way{}, 5) }

// A nomad is a server and its agent.
type nomad struct {
	*server
	*lab.Nomad
}

// A nomadFederation is Nomad in two regions.
type nomadFederation struct {
	*federation
	agents  []*nomad
	clients [2]*lab.Nomad
}

func testNomad(t *testing.T, w way, raftMultiplier int) {
	f := &nomadFederation{federation: newFederation(t, w, lab.Options{HostsA: 4, HostsB: 4}, [2]int{3, 3}, nomadKind)}
	f.startAgents(raftMultiplier)
	f.seeEachOther()
	f.askEachOther()
	f.runJobs("before")
	changes := f.restartSidecars()
	if w.redirect && changes != 0 {
		t.Errorf("restarts of sidecars have cost %d leaders, want none with redirect", changes)
	}
	lost := f.loseASidecar()
	if wanted := !w.redirect && raftMultiplier == 0; lost != wanted {
		t.Errorf("without its sidecar the leader was lost: %v, want %v", lost, wanted)
	}
	f.seeEachOther()
	f.askEachOther()
	f.runJobs("after")
	f.wantTLSAlone()
}

// startAgents starts the servers and, on each site's last host, a client.
func (f *nomadFederation) startAgents(raftMultiplier int) {
	f.t.Helper()
	for _, s := range f.servers {
		if s.Kind != nomadKind {
			continue
		}
		here, there := f.of(nomadKind, s.at), f.of(nomadKind, 1-s.at)
		o := lab.NomadOptions{
			Region: s.Site, Node: s.Node, Encrypt: gossipKey, Expect: len(here), RaftMultiplier: raftMultiplier,
			Join: append(addresses(here, lan), addresses(there, wan)...),
		}
		if !f.redirect {
			o.Bind, o.AdvertiseSerf = s.Host.Addr, s.Advertise
		}
		f.agents = append(f.agents, &nomad{s, s.Host.StartNomad(o)})
	}
	for at := range siteAt(2) {
		site := f.Sites[at]
		host := site.Hosts[len(site.Hosts)-1]
		f.clients[at] = host.StartNomad(lab.NomadOptions{
			Region: site.Name, Node: "worker-" + site.Name, Servers: addresses(f.of(nomadKind, at), lan),
		})
	}
}

// in are the agents of a site.
func (f *nomadFederation) in(at siteAt) []*nomad {
	var out []*nomad
	for _, n := range f.agents {
		if n.at == at {
			out = append(out, n)
		}
	}
	return out
}

// seeEachOther waits until both regions have a leader, and each server sees all
// alive at their addresses.
func (f *nomadFederation) seeEachOther() {
	f.t.Helper()
	took := all(f.t, settle, f.agents, func(n *nomad) error {
		if n.Ended() {
			f.t.Fatalf("nomad on %s has ended:\n%s", n.Host.Name, n.Tail(2000))
		}
		return f.seesAll(n)
	})
	f.t.Logf("all %d servers see each other after %v", len(f.agents), took.Round(time.Millisecond))
	took = all(f.t, settle, f.agents, func(n *nomad) error {
		for at := range siteAt(2) {
			leader, err := n.Leader(f.Sites[at].Name)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(f.in(at), func(o *nomad) bool { return leader == netip.AddrPortFrom(o.Advertise, 4647) }) {
				return fmt.Errorf("%s says that the leader of %s is at %v", n.Node, f.Sites[at].Name, leader)
			}
		}
		return nil
	})
	f.t.Logf("all know the leaders of both regions after %v more", took.Round(time.Millisecond))
	// It asks the other region for its leader, on a connection that may have been
	// cut off with a sidecar: the next one is new.
	all(f.t, settle, f.agents, func(n *nomad) error {
		out, err := n.Do("server members")
		if err == nil && strings.Count(out, " alive ") != len(f.agents) {
			err = fmt.Errorf("nomad server members on %s:\n%s", n.Node, out)
		}
		return err
	})
}

func (f *nomadFederation) seesAll(n *nomad) error {
	members, err := n.Members()
	if err != nil {
		return err
	}
	want := make(map[string]lab.NomadMember)
	for _, o := range f.agents {
		want[o.Node+"."+o.Site] = lab.NomadMember{Address: lab.HostPort(o.Advertise, 4648), Status: "alive"}
	}
	if fmt.Sprint(members) != fmt.Sprint(want) {
		return fmt.Errorf("%s sees %v, want %v", n.Node, members, want)
	}
	return nil
}

// askEachOther asks each server about the other region.
func (f *nomadFederation) askEachOther() {
	f.t.Helper()
	all(f.t, settle, f.agents, func(n *nomad) error {
		there := f.Sites[1-n.at].Name
		if client := f.clients[1-n.at]; client.Ended() {
			f.t.Fatalf("the client of %s has ended:\n%s", there, client.Tail(2000))
		}
		out, err := n.Do("node status", "-region="+there)
		if err == nil && (!strings.Contains(out, "worker-"+there) || !strings.Contains(out, " ready") || strings.Contains(out, "worker-"+n.Site)) {
			err = fmt.Errorf("nodes of %s seen from %s:\n%s", there, n.Node, out)
		}
		if err != nil {
			return err
		}
		out, err = n.Do("operator raft list-peers", "-region="+there)
		if err == nil {
			for _, o := range f.in(1 - n.at) {
				if !strings.Contains(out, lab.HostPort(o.Advertise, 4647)) {
					err = fmt.Errorf("raft peers of %s seen from %s:\n%s", there, n.Node, out)
				}
			}
		}
		return err
	})
}

const job = `job %q {
  region      = %q
  datacenters = [%[2]q]
  type        = "batch"
  group "one" {
    task "one" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", "echo $NOMAD_JOB_NAME ran in $NOMAD_REGION"]
      }
      resources {
        cpu    = 20
        memory = 16
      }
    }
  }
}
`

// runJobs lets each server run a job in the other region, and read what it has
// printed there, which streams from the client through both regions' servers.
func (f *nomadFederation) runJobs(when string) {
	f.t.Helper()
	for _, n := range f.agents {
		there, name := f.Sites[1-n.at].Name, "of-"+n.Node+"-"+when
		file := n.Host.WriteFile(name+".nomad", fmt.Sprintf(job, name, there))
		if out, err := n.Do("job run", "-region="+there, "-detach", file); err != nil {
			f.t.Errorf("job run on %s: %q, %v", n.Node, out, err)
			continue
		}
		var id string
		lab.Eventually(f.t, 60*time.Second, func() error {
			var allocs []struct{ ID, ClientStatus, NodeName string }
			if _, err := n.Call("GET", "/v1/job/"+name+"/allocations?region="+there, nil, &allocs); err != nil {
				return err
			}
			if len(allocs) != 1 || allocs[0].ClientStatus != "complete" || allocs[0].NodeName != "worker-"+there {
				return fmt.Errorf("allocations of %s: %+v", name, allocs)
			}
			id = allocs[0].ID
			return nil
		})
		// The command for this tries the node's own address before its server,
		// which is nothing that a server does.
		var out string
		_, err := n.Call("GET", "/v1/client/fs/logs/"+id+"?task=one&type=stdout&plain=true&region="+there, nil, &out)
		if want := name + " ran in " + there; err != nil || strings.TrimSpace(out) != want {
			f.t.Errorf("the log of %s on %s: %q, %v, want %q", name, n.Node, out, err, want)
		}
		// It is in the other region and nowhere else.
		if out, err := n.Do("job status", name); err == nil {
			f.t.Errorf("%s has %s in its own region:\n%s", n.Node, name, out)
		}
	}
}

// restartSidecars restarts one sidecar after the other and counts how often a
// region has another term of raft afterwards.
func (f *nomadFederation) restartSidecars() (changes int) {
	f.t.Helper()
	const limit = 30 * time.Second
	for _, n := range f.agents {
		before, leader := f.terms(), f.leader(n.at)
		role := "a follower"
		if leader.Addr() == n.Advertise {
			role = "the leader"
		}
		n.sidecar.Stop()
		n.sidecar.Again()
		n.sidecar.AwaitReady()
		// Raft notices within its timeouts, which end while this waits.
		lab.Wait(5 * time.Second)
		took := all(f.t, limit, f.agents, f.seesAll)
		took += all(f.t, limit, f.agents, func(o *nomad) error {
			_, err := o.Leader(n.Site)
			return err
		})
		after := f.terms()
		for at := range siteAt(2) {
			if before[at] != after[at] {
				changes++
			}
		}
		f.t.Logf("restart of the sidecar of %s, %s of %s: terms %v before and %v after, leader %v before and %v after, all well after %v",
			n.Node, role, n.Site, before, after, leader, f.leader(n.at), took.Round(time.Millisecond))
	}
	return changes
}

// loseASidecar has the leader of dc1 without its sidecar for a second, and tells
// whether that has cost it its office. Raft's lease is half a second, times the
// multiplier.
func (f *nomadFederation) loseASidecar() bool {
	f.t.Helper()
	const away = time.Second
	before, leader := f.terms(), f.leader(0)
	i := slices.IndexFunc(f.agents, func(n *nomad) bool { return n.Advertise == leader.Addr() })
	if i < 0 {
		f.t.Fatalf("nobody is at %v", leader)
	}
	n := f.agents[i]
	n.sidecar.Kill()
	lab.Wait(away)
	n.sidecar.Again()
	n.sidecar.AwaitReady()
	lab.Wait(5 * time.Second)
	took := all(f.t, settle, f.agents, f.seesAll)
	after := f.terms()
	f.t.Logf("%s, the leader of %s, was without its sidecar for %v: terms %v before and %v after, leader %v before and %v after, all well after %v",
		n.Node, n.Site, away, before, after, leader, f.leader(0), took.Round(time.Millisecond))
	return before[0] != after[0]
}

// terms are the terms of both regions.
func (f *nomadFederation) terms() (terms [2]string) {
	f.t.Helper()
	for at := range siteAt(2) {
		lab.Eventually(f.t, 30*time.Second, func() error {
			terms[at] = ""
			for _, n := range f.in(at) {
				term, err := n.Term()
				if err != nil {
					return err
				}
				if terms[at] != "" && terms[at] != term {
					return fmt.Errorf("the servers of %s are in terms %s and %s", n.Site, terms[at], term)
				}
				terms[at] = term
			}
			return nil
		})
	}
	return terms
}

// leader is where the leader of a region is.
func (f *nomadFederation) leader(at siteAt) (leader netip.AddrPort) {
	f.t.Helper()
	lab.Eventually(f.t, 30*time.Second, func() (err error) {
		leader, err = f.in(at)[0].Leader(f.Sites[at].Name)
		return err
	})
	return leader
}
