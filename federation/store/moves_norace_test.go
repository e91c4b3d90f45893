//go:build !race

package store

import (
	"testing"
	"time"

	"culvert/federation/state"
)

// hashicorp/raft 1.7.3 has a race where a member moves: updateLastAppended in
// replication.go reads the ID of a member, which stays the same, without the lock under
// which its new address is written. `make test` runs this once more without the detector.
//
// A member that comes back at another address is found there.
func TestMemberMoves(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		regs := []state.Registration{server("dc1", "alice", "127.77.1.1"), server("dc1", "amy", "127.77.1.2"), server("dc1", "art", "127.77.1.3")}
		first := leader(t, ns...)
		mover := without(ns, first)[0]
		mover.stop()
		w.mu.Lock()
		delete(w.nodes, mover.o.Address)
		mover.o.Address = "elsewhere.lan:8443"
		w.nodes[mover.o.Address] = mover
		w.mu.Unlock()
		mover.start()
		for i := range regs {
			if regs[i].Server.Node == mover.o.Node {
				regs[i].Server.Address = mover.o.Address
			}
		}
		stop := keep(t, regs, ns...)
		defer stop()
		eventually(t, 15*time.Second, "raft has its new address", func() bool {
			for _, p := range first.store.Peers() {
				if p.Node == mover.o.Node {
					return p.Address == mover.o.Address && p.Voter && time.Since(p.Heard) < time.Second
				}
			}
			return false
		})
		if !same(ns...) {
			sleep(time.Second)
		}
		if !same(ns...) {
			t.Error("it has not caught up")
		}
	})
}
