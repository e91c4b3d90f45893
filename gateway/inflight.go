package gateway

import "sync"

// inflight holds the random of every ClientHello that is being passed on. The
// same one coming in again is a connection that found its way back, through NAT
// or names, to where it was: passed on once more it would go round until
// something runs out. It is as large as there are connections, which package mux
// bounds.
type inflight struct {
	mu      sync.Mutex
	randoms map[[32]byte]struct{}
}

func newInflight() *inflight { return &inflight{randoms: make(map[[32]byte]struct{})} }

// add reports whether the random was not there yet. Where it was not, remove
// must follow.
func (f *inflight) add(random [32]byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, there := f.randoms[random]; there {
		return false
	}
	f.randoms[random] = struct{}{}
	return true
}

func (f *inflight) remove(random [32]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.randoms, random)
}
