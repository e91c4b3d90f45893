package store

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"culvert/federation/state"
)

// An fsm folds the log into a state.
type fsm struct {
	log     *zap.Logger
	guard   *guard
	publish func(s *state.State, index uint64) // at each change, in order

	mu     sync.Mutex
	state  *state.State
	index  uint64 // of the last entry that was applied
	opened bool   // what is restored comes from the leader, not from the disk
}

var _ raft.BatchingFSM = (*fsm)(nil)

// applied is what an entry has led to.
type applied struct {
	index uint64 // the state's after it
	err   error
}

func (f *fsm) load() *state.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state
}

// Apply implements [raft.FSM].
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements [raft.BatchingFSM]: who waits for changes is woken
// once.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.guard.failure(); err != nil {
		// This node is cut off and is about to begin anew with what is on the
		// disk: what raft goes on to do in memory is not to be seen.
		for i := range out {
			out[i] = applied{err: err}
		}
		return out
	}
	for i, l := range logs {
		if l.Type != raft.LogCommand {
			continue
		}
		next, err := fold(f.state, l)
		if err != nil && next == nil {
			f.log.Warn("entry of the store makes no sense and is left out", zap.Uint64("index", l.Index), zap.Error(err))
			next = f.state
		}
		f.state, f.index = next, l.Index
		out[i] = applied{next.Index(), err}
	}
	f.publish(f.state, f.index)
	return out
}

// fold returns the state after an entry; nil with an error if the entry makes
// no sense, which it does nowhere.
func fold(s *state.State, l *raft.Log) (*state.State, error) {
	var c state.Command
	if err := json.Unmarshal(l.Data, &c); err != nil {
		return nil, fmt.Errorf("decode command: %w", err)
	}
	return s.Apply(l.Index, c)
}

// Snapshot implements [raft.FSM].
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.guard.failure(); err != nil {
		return nil, err // there are entries that raft has applied and this has not
	}
	return snapshot{f.load()}, nil
}

// Restore implements [raft.FSM].
func (f *fsm) Restore(r io.ReadCloser) error {
	s, err := loadState(r)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state, f.index = s, s.Index()
	if f.opened {
		f.publish(s, f.index)
	}
	return nil
}

func loadState(r io.Reader) (*state.State, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return state.Load(b)
}

// open is called when raft has restored what is on the disk.
func (f *fsm) open() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened = true
	f.publish(f.state, f.index)
}

type snapshot struct{ state *state.State }

// Persist implements [raft.FSMSnapshot].
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	b, err := s.state.MarshalJSON()
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		_ = sink.Cancel() // the error says it all
		return err
	}
	return sink.Close()
}

// Release implements [raft.FSMSnapshot].
func (snapshot) Release() {}
