package state

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// TakeOver is how long an entry has to be critical before another process may
// have its name or its address.
const TakeOver = 2 * time.Minute

// A Command changes a state. One of its parts is set.
type Command struct {
	// At is the time of who gave the command, to the second: nobody's clock
	// is asked when it is applied.
	At time.Time `json:"at"`

	// Found names the store, once.
	Found string `json:"found,omitempty"`
	// Register puts an entry, or puts it right.
	Register *Registration `json:"register,omitempty"`
	// Critical tells that owners have stopped to renew their entries.
	Critical []Key `json:"critical,omitempty"`
	// Remove takes entries away.
	Remove *Removal `json:"remove,omitempty"`
}

// A Registration is one entry: a server or a gateway.
type Registration struct {
	Datacenter string   `json:"datacenter"`
	Server     *Server  `json:"server,omitempty"`
	Gateway    *Gateway `json:"gateway,omitempty"`
}

// A Removal takes entries away.
type Removal struct {
	Keys []Key `json:"keys,omitempty"`
	// Left keeps the processes that run from coming back by themselves.
	Left bool `json:"left,omitempty"`
	// Before forgets those that left before it.
	Before time.Time `json:"before"`
}

// Key returns whose entry it is.
func (r *Registration) Key() Key {
	if r.Server != nil {
		return Key{r.Datacenter, KindServer, r.Server.Node}
	}
	return Key{r.Datacenter, KindGateway, r.Gateway.Name}
}

// Process returns who registers.
func (r *Registration) Process() *Process {
	if r.Server != nil {
		return &r.Server.Process
	}
	return &r.Gateway.Process
}

// Check tells what is wrong with an entry by itself.
func (r *Registration) Check() error {
	if (r.Server == nil) == (r.Gateway == nil) {
		return errors.New("an entry is a server or a gateway")
	}
	one := Record{Datacenter: r.Datacenter}
	if r.Server != nil {
		one.Servers = []Server{*r.Server}
	} else {
		one.Gateways = []Gateway{*r.Gateway}
	}
	return one.Check()
}

// The reasons of a [ConflictError].
const (
	ConflictName    = "name"
	ConflictAddress = "address"
	ConflictLeft    = "left"
)

// A ConflictError is an entry that is refused for another's sake.
type ConflictError struct {
	Reason string // name, address or left
	Key    Key    // who was refused
	Holder Key    // who has what was claimed; the same key for a name
	Detail string // says it in words
}

func (e *ConflictError) Error() string { return e.Detail }

// ErrFull is returned for one entry too many.
var ErrFull = errors.New("the store is full")

// Apply returns the state after a command. Where that is refused the error is a
// [*ConflictError], [ErrFull] or tells what is wrong with the entry, and the
// state is s itself. So it is where the command changes nothing.
func (s *State) Apply(index uint64, c Command) (*State, error) {
	at := c.At.UTC().Truncate(time.Second)
	if y := at.Year(); y < 0 || y > 9999 { // what JSON cannot have
		return s, fmt.Errorf("the time of the command is in the year %d", y)
	}
	switch {
	case c.Found != "":
		if s.store != "" {
			return s, nil
		}
		n := s.next(index)
		n.store = c.Found
		return n, nil
	case c.Register != nil:
		return s.register(index, c.Register, at)
	case len(c.Critical) > 0:
		return s.critical(index, c.Critical, at), nil
	case c.Remove != nil:
		return s.remove(index, c.Remove, at), nil
	}
	return s, nil
}

func (s *State) register(index uint64, reg *Registration, at time.Time) (*State, error) {
	if err := reg.Check(); err != nil {
		return s, err
	}
	if s.Has(reg) { // most are renewals, and Admit looks at all records
		return s, nil
	}
	if err := s.Admit(reg, at); err != nil {
		return s, err
	}
	r := s.edit(reg.Datacenter)
	if s.entry(reg.Datacenter) == nil && len(s.entries) >= MaxDatacenters {
		return s, fmt.Errorf("%w: %d datacenters", ErrFull, MaxDatacenters)
	}
	if reg.Server != nil {
		r.putServer(*reg.Server, at)
	} else {
		r.putGateway(*reg.Gateway, at)
	}
	if len(r.Servers) > MaxServers || len(r.Gateways) > MaxGateways {
		return s, fmt.Errorf("%w: %s has %d servers and %d gateways at most", ErrFull, reg.Datacenter, MaxServers, MaxGateways)
	}
	n := s.next(index)
	n.put(r, at)
	if reg.Server != nil { // an address that changes hands leaves those that had it
		for _, k := range n.claimants(reg) {
			r := n.edit(k.Datacenter)
			r.drop(k)
			n.put(r, at)
		}
	}
	if _, left := n.left[reg.Key()]; left {
		n.left = maps.Clone(n.left)
		delete(n.left, reg.Key())
	}
	return n, nil
}

// Has tells whether the entry is there as it is registered, and passing: there
// is nothing to change.
func (s *State) Has(reg *Registration) bool {
	e := s.entry(reg.Datacenter)
	if e == nil {
		return false
	}
	if reg.Gateway != nil {
		g, ok := e.Gateway(reg.Gateway.Name)
		a, b := *reg.Gateway, g
		a.Since, b.Since, a.Replaced, b.Replaced = time.Time{}, time.Time{}, "", ""
		return ok && a == b
	}
	sv, ok := e.Server(reg.Server.Node)
	a, b := *reg.Server, sv
	return ok && a.Advertise == b.Advertise && a.Address == b.Address && a.Version == b.Version && a.Health == b.Health &&
		a.Instance == b.Instance && a.Start == b.Start && slices.Equal(sortedServices(a.Services), b.Services)
}

func sortedServices(all []Service) []Service {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

func (r *Record) putServer(sv Server, at time.Time) {
	sv.Services, sv.Since = sortedServices(sv.Services), at
	i, ok := r.server(sv.Node)
	if !ok {
		r.Servers = slices.Insert(r.Servers, i, sv)
		return
	}
	old := r.Servers[i]
	if old.Health == sv.Health {
		sv.Since = old.Since
	}
	sv.Replaced = replaced(old.Process, sv.Process)
	r.Servers[i] = sv
}

func (r *Record) putGateway(g Gateway, at time.Time) {
	g.Since = at
	i, ok := r.gateway(g.Name)
	if !ok {
		r.Gateways = slices.Insert(r.Gateways, i, g)
		return
	}
	old := r.Gateways[i]
	if old.Health == g.Health {
		g.Since = old.Since
	}
	g.Replaced = replaced(old.Process, g.Process)
	r.Gateways[i] = g
}

// replaced is who had an entry before the process that has it now.
func replaced(old, now Process) string {
	if old.Start == now.Start {
		return old.Replaced
	}
	return old.Start
}

func (r *Record) drop(k Key) {
	if k.Kind == KindServer {
		r.Servers = slices.DeleteFunc(r.Servers, func(s Server) bool { return s.Node == k.Name })
		return
	}
	r.Gateways = slices.DeleteFunc(r.Gateways, func(g Gateway) bool { return g.Name == k.Name })
}

// critical marks entries. It does nothing to those that are marked.
func (s *State) critical(index uint64, keys []Key, at time.Time) *State {
	n := s.next(index)
	changed := false
	for _, keys := range byDatacenter(keys) {
		r := n.edit(keys[0].Datacenter)
		touched := false
		for _, k := range keys {
			touched = r.mark(k, at) || touched
		}
		if touched {
			n.put(r, at)
			changed = true
		}
	}
	if !changed {
		return s
	}
	return n
}

func (r *Record) mark(k Key, at time.Time) bool {
	if i, ok := r.server(k.Name); ok && k.Kind == KindServer && r.Servers[i].Health != Critical {
		r.Servers[i].Health, r.Servers[i].Since = Critical, at
		return true
	}
	if i, ok := r.gateway(k.Name); ok && k.Kind == KindGateway && r.Gateways[i].Health != Critical {
		r.Gateways[i].Health, r.Gateways[i].Since = Critical, at
		return true
	}
	return false
}

// byDatacenter groups keys, in the same order everywhere.
func byDatacenter(keys []Key) [][]Key {
	var out [][]Key
	for _, k := range slices.SortedFunc(slices.Values(keys), Key.compare) {
		if last := len(out) - 1; last >= 0 && out[last][0].Datacenter == k.Datacenter {
			out[last] = append(out[last], k)
		} else {
			out = append(out, []Key{k})
		}
	}
	return out
}

// remove takes entries away, and forgets those that left long ago.
func (s *State) remove(index uint64, rm *Removal, at time.Time) *State {
	n := s.next(index)
	left := maps.Clone(s.left)
	if left == nil {
		left = make(map[Key]Departure)
	}
	maps.DeleteFunc(left, func(_ Key, d Departure) bool { return d.At.Before(rm.Before) })
	changed := len(left) != len(s.left)
	for _, keys := range byDatacenter(rm.Keys) {
		r := n.edit(keys[0].Datacenter)
		touched := false
		for _, k := range keys {
			p, ok := r.process(k)
			if !ok {
				continue
			}
			touched = true
			if rm.Left {
				left[k] = Departure{Start: p.Start, At: at}
			}
			r.drop(k)
		}
		if touched {
			n.put(r, at)
			changed = true
		}
	}
	if !changed {
		return s
	}
	n.left = left
	return n
}

// process returns who registered an entry.
func (r *Record) process(k Key) (Process, bool) {
	if k.Kind == KindServer {
		s, ok := r.Server(k.Name)
		return s.Process, ok
	}
	g, ok := r.Gateway(k.Name)
	return g.Process, ok
}
