package store

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The leader is killed five times under a stream of registrations, and then all
// three at once. Nothing that was acknowledged is lost, though whatever was not
// synced is.
func TestKilledLeaders(t *testing.T) {
	needTap(t)
	bubble(t, func(t *testing.T, w *world) {
		ns := w.three()
		for _, n := range ns {
			n.o.snapshotEvery = 180
			n.stop()
			n.start()
		}
		leader(t, ns...)
		s := newStream(t, ns)
		for kill := range 5 {
			s.waitFor(150 * (kill + 1))
			first := leader(t, ns...)
			first.kill()
			sleep(time.Duration(kill) * time.Second)
			first.start()
		}
		s.waitFor(900)
		for _, n := range ns {
			n.kill()
		}
		s.stop()
		for _, n := range ns {
			n.start()
		}
		leader(t, ns...)
		eventually(t, 20*time.Second, "all have the same", func() bool { return same(ns...) })
		acked := s.acknowledged()
		if len(acked) < 900 {
			t.Fatalf("%d were acknowledged", len(acked))
		}
		lost := 0
		for _, i := range acked {
			if _, ok := find(ns[0].store.State(), numbered(i)); !ok {
				lost++
			}
		}
		if lost > 0 {
			t.Errorf("%d of %d acknowledged registrations are lost", lost, len(acked))
		}
		t.Logf("%d acknowledged, none lost", len(acked))
	})
}

// A stream registers server after server, each until it is acknowledged.
type stream struct {
	t      *testing.T
	cancel context.CancelFunc
	wg     sync.WaitGroup
	next   atomic.Int64
	mu     sync.Mutex
	acked  []int
}

func newStream(t *testing.T, ns []*node) *stream {
	ctx, cancel := context.WithCancel(t.Context())
	s := &stream{t: t, cancel: cancel}
	stores := func() []*Store {
		ns[0].w.mu.Lock()
		defer ns[0].w.mu.Unlock()
		var out []*Store
		for _, n := range ns {
			if n.up {
				out = append(out, n.store)
			}
		}
		return out
	}
	for range 8 {
		s.wg.Go(func() { s.run(ctx, stores) })
	}
	return s
}

func (s *stream) run(ctx context.Context, stores func() []*Store) {
	for ctx.Err() == nil {
		i := int(s.next.Add(1))
		for done := false; !done && ctx.Err() == nil; {
			for _, store := range stores() {
				if _, err := store.Register(ctx, numbered(i)); err == nil {
					done = true
					break
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
		if ctx.Err() == nil {
			s.mu.Lock()
			s.acked = append(s.acked, i)
			s.mu.Unlock()
		}
	}
}

func (s *stream) acknowledged() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}

func (s *stream) waitFor(n int) {
	s.t.Helper()
	eventually(s.t, 2*time.Minute, "more are acknowledged", func() bool { return len(s.acknowledged()) >= n })
}

func (s *stream) stop() {
	s.cancel()
	s.wg.Wait()
}

// Two syncs make a whole batch safe, of its entries and of what leads to them, and
// there is no acknowledgement before the second.
func TestSyncsOfABatch(t *testing.T) {
	needTap(t)
	w := newWorld(t) // on the real clock: in a bubble all wait for a call that waits
	defer w.stopAll()
	n := w.add("alice", 1)
	n.start()
	register(t, numbered(0), n)
	for i := range 20 {
		syncs, resizes := n.disk.syncs.Load(), n.disk.resizes.Load()
		register(t, numbered(1000+i), n)
		if syncs = n.disk.syncs.Load() - syncs; syncs != 2 {
			t.Errorf("one registration alone took %d syncs, and %d more for a longer file", syncs, n.disk.resizes.Load()-resizes)
		}
	}
	// While the disk takes its time for one, many others come.
	const many = 400
	syncs, writes := n.disk.syncs.Load(), n.disk.writes.Load()
	release := n.disk.hold()
	var wg sync.WaitGroup
	var acked atomic.Int64
	for i := range many {
		wg.Go(func() {
			if _, err := n.store.Register(t.Context(), numbered(1+i)); err != nil {
				t.Error(err)
			}
			acked.Add(1)
		})
	}
	time.Sleep(500 * time.Millisecond)
	if a := acked.Load(); a != 0 {
		t.Errorf("%d were acknowledged before a sync", a)
	}
	release()
	wg.Wait()
	syncs, writes = n.disk.syncs.Load()-syncs, n.disk.writes.Load()-writes
	if syncs != 2*writes || writes < 2 || writes > 10 {
		t.Errorf("%d registrations took %d batches and %d syncs", many, writes, syncs)
	}
	t.Logf("%d registrations at once took %d batches with two syncs each", many, writes)
}
