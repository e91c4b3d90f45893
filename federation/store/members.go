package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"culvert/federation/state"
	"culvert/internal/pause"
)

const (
	// maxVoters is how many vote; those above follow.
	maxVoters = 7
	// steadyTime is how long a new member has to keep up before it votes.
	steadyTime = 3 * time.Second
	// heardTime is how old the last answer of a member that is well may be.
	heardTime = time.Second
	// closeEnough is how many entries behind a member is that keeps up.
	closeEnough = 64
	// memberTimeout is how long one change of the raft group may take.
	memberTimeout = 10 * time.Second
)

// A keeper makes the raft group follow what is registered, while this node
// leads.
type keeper struct {
	store  *Store
	engine *engine
	began  time.Time
	seen   map[raft.ServerID]bool      // was registered since
	steady map[raft.ServerID]time.Time // keeps up since
}

// keepMembers makes the raft group follow the registered servers of this
// datacenter until ctx ends.
func (s *Store) keepMembers(ctx context.Context, e *engine) {
	k := &keeper{s, e, time.Now(), make(map[raft.ServerID]bool), make(map[raft.ServerID]time.Time)}
	for pause.For(ctx, tick) {
		if err := k.step(ctx); err != nil && ctx.Err() == nil {
			if left, ok := s.sampler.Allow("members " + err.Error()); ok {
				s.log.Warn("member of the store is not changed", zap.Error(err), zap.Int("suppressed", left))
			}
		}
	}
}

// step makes one change, if one is due.
func (k *keeper) step(ctx context.Context) error {
	st := k.engine.fsm.load()
	servers := registered(st, k.store.o.Datacenter)
	members := k.engine.members()
	for id := range servers {
		k.seen[id] = true
	}
	for _, m := range members {
		sv, ok := servers[m.ID]
		switch {
		case !ok && k.gone(st, m.ID):
			return k.remove(members, m)
		case !ok:
		case m.Address != raftAddress(sv.Node, sv.Address) && sv.Health == state.Passing:
			return k.move(m, sv)
		case k.ripe(members, m, sv):
			k.store.log.Info("server votes in the store", zap.String("node", sv.Node))
			return k.engine.raft.AddVoter(m.ID, m.Address, 0, memberTimeout).Error()
		}
	}
	for id, sv := range servers {
		isMember := slices.ContainsFunc(members, func(m raft.Server) bool { return m.ID == id })
		if !isMember && sv.Health == state.Passing {
			if err := k.add(ctx, st, sv); err != nil {
				return err
			}
		}
	}
	return nil
}

func registered(st *state.State, datacenter string) map[raft.ServerID]*state.Server {
	out := make(map[raft.ServerID]*state.Server)
	if r := st.Record(datacenter); r != nil {
		for i := range r.Servers {
			out[raft.ServerID(r.Servers[i].Node)] = &r.Servers[i]
		}
	}
	return out
}

// gone tells whether a member that is not registered is no more. One that has
// never registered is given time: it may be among those that begin.
func (k *keeper) gone(st *state.State, id raft.ServerID) bool {
	key := state.Key{Datacenter: k.store.o.Datacenter, Kind: state.KindServer, Name: string(id)}
	return st.Departed(key) || k.seen[id] || time.Since(k.began) > k.store.o.Reap
}

// ripe tells whether a member that follows may vote.
func (k *keeper) ripe(members []raft.Server, m raft.Server, sv *state.Server) bool {
	heard := k.engine.trans.contact(m.ID)
	well := sv.Health == state.Passing && time.Since(heard.at) <= heardTime && heard.last+closeEnough >= k.engine.raft.CommitIndex()
	if m.Suffrage == raft.Voter || !well {
		delete(k.steady, m.ID)
		return false
	}
	since, ok := k.steady[m.ID]
	if !ok {
		k.steady[m.ID] = time.Now()
	}
	return ok && time.Since(since) >= steadyTime && voters(members) < maxVoters
}

func voters(members []raft.Server) int {
	n := 0
	for _, m := range members {
		if m.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

// add makes a server a member that follows.
func (k *keeper) add(ctx context.Context, st *state.State, sv *state.Server) error {
	o := &k.store.o
	if o.DataDir == "" {
		return fmt.Errorf("%s cannot be a member: this store is in memory and has one voter; give it a data_dir to have more", sv.Node)
	}
	if o.Neighbours != nil {
		ctx, cancel := context.WithTimeout(ctx, greetTimeout)
		defer cancel()
		g, err := o.Neighbours.Greet(ctx, sv.Address)
		switch {
		case err != nil:
			return fmt.Errorf("ask %s at %s: %w", sv.Node, sv.Address, err)
		case g.Node != sv.Node:
			return fmt.Errorf("%s is to be at %s, and %s is there", sv.Node, sv.Address, g.Node)
		case g.Memory:
			return fmt.Errorf("%s cannot be a member: it keeps its store in memory; give it a data_dir", sv.Node)
		case g.Store != "" && g.Store != st.Store():
			return fmt.Errorf("%s belongs to another store, %s: remove the folder raft in its data_dir to let it join this one, %s", sv.Node, g.Store, st.Store())
		}
	}
	k.store.log.Info("server joins the store", zap.String("node", sv.Node), zap.String("address", sv.Address))
	return k.engine.raft.AddNonvoter(raft.ServerID(sv.Node), raftAddress(sv.Node, sv.Address), 0, memberTimeout).Error()
}

// move tells raft of a member's new address.
func (k *keeper) move(m raft.Server, sv *state.Server) error {
	k.store.log.Info("member of the store has moved", zap.String("node", sv.Node), zap.String("address", sv.Address))
	change := k.engine.raft.AddNonvoter
	if m.Suffrage == raft.Voter {
		change = k.engine.raft.AddVoter
	}
	return change(m.ID, raftAddress(sv.Node, sv.Address), 0, memberTimeout).Error()
}

// remove takes a member away.
func (k *keeper) remove(members []raft.Server, m raft.Server) error {
	switch {
	case m.Suffrage == raft.Voter && voters(members) == 1:
		return nil // somebody has to keep what there is
	case m.ID == k.engine.self:
		return k.engine.raft.LeadershipTransfer().Error() // who leads then removes it
	}
	k.store.log.Info("server is no member of the store any more", zap.String("node", string(m.ID)))
	return k.engine.raft.RemoveServer(m.ID, 0, memberTimeout).Error()
}

// A Peer is a member of the raft group.
type Peer struct {
	Node    string `json:"node"`
	Address string `json:"address"`
	Voter   bool   `json:"voter"`
	Leader  bool   `json:"leader"`
	// Heard is when it last answered this node; zero where that is not known:
	// the leader alone hears of all, the others of the leader.
	Heard time.Time `json:"heard,omitzero"`
}

// Peers returns the members of the raft group, as far as this node knows, in
// the order of their names.
func (s *Store) Peers() []Peer {
	e := s.current()
	if e == nil {
		return nil
	}
	_, leader := e.raft.LeaderWithID()
	var out []Peer
	for _, m := range e.members() {
		p := Peer{Node: string(m.ID), Voter: m.Suffrage == raft.Voter, Leader: m.ID == leader}
		_, p.Address = splitAddress(m.Address)
		switch {
		case m.ID == e.self:
			p.Heard = time.Now()
		case leader == e.self:
			p.Heard = e.trans.contact(m.ID).at
		case m.ID == leader:
			p.Heard = e.raft.LastContact()
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(a.Node, b.Node) })
	return out
}

// Leader returns who leads, if that is known.
func (s *Store) Leader() (node, address string, ok bool) {
	e := s.current()
	if e == nil {
		return "", "", false
	}
	a, id := e.raft.LeaderWithID()
	if id == "" {
		return "", "", false
	}
	_, address = splitAddress(a)
	return string(id), address, true
}

// What RemovePeer does not do.
var (
	ErrNoMember  = errors.New("no member of the store")
	ErrLastVoter = errors.New("the last voter stays: it keeps the store")
)

// RemovePeer takes a member out of the raft group that is not there any more. A
// server that is registered and passing is added again. The leader itself hands
// its office over first, and returns a [*NotLeaderError].
func (s *Store) RemovePeer(ctx context.Context, node string) error {
	e, _, err := s.leading()
	if err != nil {
		return err
	}
	if !e.enter() {
		return &NotLeaderError{}
	}
	defer e.applies.Done()
	members := e.members()
	i := slices.IndexFunc(members, func(m raft.Server) bool { return string(m.ID) == node })
	switch {
	case i < 0:
		return fmt.Errorf("%s: %w", node, ErrNoMember)
	case members[i].Suffrage == raft.Voter && voters(members) == 1:
		return ErrLastVoter
	case members[i].ID == e.self:
		if err := e.raft.LeadershipTransfer().Error(); err != nil {
			return fmt.Errorf("hand over the lead before %s is removed: %w", node, err)
		}
		return s.explain(e, raft.ErrNotLeader)
	}
	timeout := memberTimeout
	if t, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(t))
	}
	s.log.Info("member of the store is removed by hand", zap.String("node", node))
	return s.explain(e, e.raft.RemoveServer(raft.ServerID(node), 0, timeout).Error())
}
