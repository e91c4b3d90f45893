// Package connset keeps the open connections of a server, so that it can wait
// for them when it stops and cut off what is left.
//
//	remove, ok := set.Add(conn)
//	if !ok { ... } // stopping: refuse
//	defer remove()
//
// A [Set] is for any number of goroutines. It closes connections only in
// [Set.Drain].
package connset

import (
	"context"
	"net"
	"sync"

	"culvert/internal/pipe"
)

// A Set is ready when made with [New].
type Set struct {
	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	closing bool
	empty   chan struct{} // closed when closing and nothing is left
}

// New returns an empty set.
func New() *Set {
	return &Set{conns: make(map[net.Conn]struct{}), empty: make(chan struct{})}
}

// Add puts a connection in. The returned function takes it out, and may be
// called more than once. It reports false, and keeps nothing, after a drain has
// begun.
func (s *Set) Add(c net.Conn) (remove func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return func() {}, false
	}
	s.conns[c] = struct{}{}
	return func() { s.remove(c) }, true
}

func (s *Set) remove(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.conns[c]; !there {
		return
	}
	delete(s.conns, c)
	if s.closing && len(s.conns) == 0 {
		close(s.empty)
	}
}

// Len is how many connections there are.
func (s *Set) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Drain lets no more connections in and waits until all have been removed. When
// ctx ends first it aborts those that are left, so that their peers see a
// reset, and returns how many that were without waiting for their removal.
func (s *Set) Drain(ctx context.Context) int {
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		if len(s.conns) == 0 {
			close(s.empty)
		}
	}
	s.mu.Unlock()
	select {
	case <-s.empty:
		return 0
	case <-ctx.Done():
	}
	s.mu.Lock()
	left := make([]net.Conn, 0, len(s.conns))
	for c := range s.conns {
		left = append(left, c)
	}
	s.mu.Unlock()
	for _, c := range left {
		pipe.Abort(c)
	}
	return len(left)
}
