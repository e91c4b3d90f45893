package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"culvert/federation/state"
)

// A NotLeaderError is returned for a write by a server that does not lead. The
// write is to be done again, there or, if Node is "", a little later: one that
// was under way when a leader lost its office may have been done or not, and
// does no harm a second time.
type NotLeaderError struct {
	Node, Address string // of the leader; "" if none is known
}

func (e *NotLeaderError) Error() string {
	if e.Node == "" {
		return "no server leads the store at present: try again"
	}
	return fmt.Sprintf("%s at %s leads the store: write there", e.Node, e.Address)
}

// A Lease is what a registration has got.
type Lease struct {
	Index    uint64        // of a state that has the entry
	TTL      time.Duration // how long it is passing without being renewed
	Warnings []string      // what its owner should know: who else wants its name or address
}

// Register puts an entry into the store, or renews it: only what changes is
// written. The entry is passing, whatever it says. Errors are a
// [*NotLeaderError], a [*state.ConflictError], [state.ErrFull], a [*DiskError],
// what is wrong with the entry, and that of ctx.
func (s *Store) Register(ctx context.Context, reg state.Registration) (Lease, error) {
	reg = normal(reg)
	if err := reg.Check(); err != nil {
		s.metrics.wrote(writeInvalid)
		return Lease{}, fmt.Errorf("register: %w", err)
	}
	e, o, err := s.leading()
	if err != nil {
		s.metrics.wrote(resultOf(err))
		return Lease{}, err
	}
	key := reg.Key()
	index, changed, err := s.write(ctx, e, state.Command{Register: &reg})
	if conflict, ok := errors.AsType[*state.ConflictError](err); ok {
		o.warn(conflict, &reg)
	}
	if err != nil {
		s.metrics.wrote(resultOf(err))
		return Lease{}, err
	}
	if !changed {
		s.metrics.wrote(writeUnchanged)
	} else {
		s.metrics.wrote(writeOK)
	}
	o.renew(key, s.o.Lease)
	return Lease{Index: index, TTL: s.o.Lease, Warnings: o.warnings(key)}, nil
}

// normal is the entry without what the store decides. It shares nothing that is
// changed with reg.
func normal(reg state.Registration) state.Registration {
	if reg.Server != nil {
		sv := *reg.Server
		sv.Health, sv.Since, sv.Replaced = state.Passing, time.Time{}, ""
		reg.Server = &sv
	}
	if reg.Gateway != nil {
		g := *reg.Gateway
		g.Health, g.Since, g.Replaced = state.Passing, time.Time{}, ""
		reg.Gateway = &g
	}
	return reg
}

// Remove takes entries away. With left their processes do not come back before
// they are started again; a server of this datacenter is no member of the raft
// group then. Keys that are not there are no error. Errors are those of Register.
func (s *Store) Remove(ctx context.Context, keys []state.Key, left bool) error {
	e, o, err := s.leading()
	changed := false
	if err == nil {
		_, changed, err = s.write(ctx, e, state.Command{Remove: &state.Removal{Keys: keys, Left: left}})
	}
	switch {
	case err != nil:
		s.metrics.wrote(resultOf(err))
		return err
	case changed:
		s.metrics.wrote(writeOK)
	default:
		s.metrics.wrote(writeUnchanged)
	}
	o.forget(keys)
	return nil
}

// leading returns what a leader needs, or why this node is none.
func (s *Store) leading() (*engine, *office, error) {
	s.mu.Lock()
	e, o, failure := s.engine, s.office, s.failure
	s.mu.Unlock()
	switch {
	case e == nil && failure != nil:
		return nil, nil, failure
	case e == nil:
		return nil, nil, &NotLeaderError{}
	}
	if err := e.disk.failure(); err != nil {
		return nil, nil, err
	}
	if o == nil || o.engine != e {
		node, address, _ := s.Leader()
		if node == s.o.Node { // it was elected a moment ago, and is not ready
			node, address = "", ""
		}
		return nil, nil, &NotLeaderError{node, address}
	}
	return e, o, nil
}

// write applies a command, unless that would change nothing or is refused: such
// commands do not get into the log. It returns an index at which the state is
// as the command wants it.
func (s *Store) write(ctx context.Context, e *engine, c state.Command) (index uint64, changed bool, err error) {
	c.At = time.Now()
	st := e.fsm.load()
	next, err := st.Apply(st.Index()+1, c)
	if err != nil || next == st {
		return st.Index(), false, err
	}
	index, err = e.apply(ctx, c)
	return index, true, s.explain(e, err)
}

// explain makes raft's errors this package's.
func (s *Store) explain(e *engine, err error) error {
	if err == nil {
		return nil
	}
	if failure := e.disk.failure(); failure != nil {
		return failure
	}
	for _, lost := range []error{raft.ErrNotLeader, raft.ErrLeadershipLost, raft.ErrLeadershipTransferInProgress, raft.ErrRaftShutdown} {
		if errors.Is(err, lost) {
			node, address, _ := s.Leader()
			if node == s.o.Node {
				node, address = "", ""
			}
			return &NotLeaderError{node, address}
		}
	}
	if errors.Is(err, raft.ErrEnqueueTimeout) {
		return fmt.Errorf("the store is too busy: %w", err)
	}
	return err
}

func resultOf(err error) string {
	var (
		conflict *state.ConflictError
		other    *NotLeaderError
		disk     *DiskError
	)
	switch {
	case errors.As(err, &conflict):
		return writeConflict
	case errors.As(err, &other):
		return writeNotLeader
	case errors.As(err, &disk):
		return writeDisk
	case errors.Is(err, state.ErrFull):
		return writeFull
	}
	return writeFailed
}

// newID names a store. It is random: two stores of one datacenter are two.
func newID() string { return rand.Text() }
