package state

import (
	"fmt"
	"slices"
	"time"
)

// Admit tells whether an entry may be registered beside the others. One name
// belongs to one process: it may start anew, and change what it says, as long as
// its Instance proves that it is the same or its addresses are. One address
// belongs to one server a port. Who has stopped renewing for [TakeOver] gives way.
// The error is a [*ConflictError].
func (s *State) Admit(reg *Registration, at time.Time) error {
	key, p := reg.Key(), reg.Process()
	if s.Left(key, p.Start) {
		return &ConflictError{ConflictLeft, key, key, fmt.Sprintf("%s has left the federation; it comes back when its process is started again", key)}
	}
	if err := s.admitName(reg, key, p, at); err != nil {
		return err
	}
	if reg.Server == nil {
		return nil
	}
	for _, k := range s.claimants(reg) {
		holder, _ := s.entry(k.Datacenter).Server(k.Name)
		if !givesWay(holder.Health, holder.Since, at) {
			return &ConflictError{ConflictAddress, key, k, fmt.Sprintf(
				"%s advertises %s, which is the address of %s (its sidecar is at %s): every server needs an address of its own",
				key, reg.Server.Advertise, k, holder.Address)}
		}
	}
	return nil
}

func givesWay(h Health, since, at time.Time) bool {
	return h == Critical && at.Sub(since) >= TakeOver
}

func (s *State) admitName(reg *Registration, key Key, p *Process, at time.Time) error {
	e := s.entry(reg.Datacenter)
	if e == nil {
		return nil
	}
	var (
		old   Process
		where string
		same  bool
		dead  bool
	)
	if reg.Server != nil {
		held, ok := e.Server(key.Name)
		if !ok {
			return nil
		}
		old, where, dead = held.Process, held.Address, givesWay(held.Health, held.Since, at)
		same = held.Address == reg.Server.Address && held.Advertise == reg.Server.Advertise
	} else {
		held, ok := e.Gateway(key.Name)
		if !ok {
			return nil
		}
		old, where, dead = held.Process, held.Address, givesWay(held.Health, held.Since, at)
		same = held.Address == reg.Gateway.Address && held.WANAddress == reg.Gateway.WANAddress
	}
	switch {
	case old.Start == p.Start || dead:
		return nil
	case old.Replaced == p.Start:
		return &ConflictError{ConflictName, key, key, fmt.Sprintf(
			"another process registers %s, at %s, and has replaced this one: stop one of them, or give one another name and certificate", key, where)}
	case same, old.Instance != "" && old.Instance == p.Instance:
		return nil
	}
	return &ConflictError{ConflictName, key, key, fmt.Sprintf(
		"%s is registered by another process, at %s: stop that one, or give one of them another name and certificate; "+
			"if it is dead already, its name is free %v after its last renewal has run out", key, where, TakeOver)}
}

// claimants are the other servers that have the address of one, on a port of
// its.
func (s *State) claimants(reg *Registration) []Key {
	var out []Key
	for _, e := range s.entries {
		if !e.addresses.mayHave(reg.Server.Advertise) {
			continue
		}
		for i := range e.Servers {
			held := &e.Servers[i]
			if held.Advertise != reg.Server.Advertise || !overlap(held.Services, reg.Server.Services) {
				continue
			}
			if k := (Key{e.Datacenter, KindServer, held.Node}); k != reg.Key() {
				out = append(out, k)
			}
		}
	}
	return out
}

func overlap(a, b []Service) bool {
	return slices.ContainsFunc(a, func(x Service) bool {
		return slices.ContainsFunc(b, func(y Service) bool { return x.Kind == y.Kind && x.Port == y.Port })
	})
}
