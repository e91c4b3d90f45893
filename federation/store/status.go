package store

import "errors"

// Status is what an operator wants to know of a store.
type Status struct {
	Store   string `json:"store"` // its name, "" before this node knows it
	Index   uint64 `json:"index"`
	Leader  string `json:"leader"` // node, "" if none is known
	Leading bool   `json:"leading"`
	Memory  bool   `json:"memory,omitempty"`
	// Waiting is what it waits for before it has begun.
	Waiting string `json:"waiting,omitempty"`
	// Error is why nothing can be written here, and what to do.
	Error string `json:"error,omitempty"`
	Peers []Peer `json:"peers"`
}

// Status tells how the store is.
func (s *Store) Status() Status {
	leader, _, _ := s.Leader()
	peers := s.Peers()
	e := s.current()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Store: s.view.Store(), Index: s.view.Index(), Leader: leader, Leading: s.office != nil,
		Memory: s.o.DataDir == "", Waiting: s.waiting, Peers: peers,
	}
	failure := s.failure
	if e != nil {
		failure = errors.Join(e.disk.failure())
	}
	if failure != nil {
		st.Error = failure.Error()
	}
	return st
}
