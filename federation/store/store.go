// Package store is the canonical store of a federation: the sidecars of the
// primary datacenter are one raft group, and what it agrees on is a
// [state.State].
//
//	s, err := store.Open(store.Options{Datacenter: "dc1", Node: "alice", ...})
//	go s.Run(ctx)
//	lease, err := s.Register(ctx, registration) // *NotLeaderError on a follower
//	changed := s.Changed()
//	use(s.State())
//	<-changed
//
// The leader alone takes writes. They are on the disks of a majority when they
// are acknowledged. It keeps the clocks as well: who renews, and who has stopped
// to. Who may write what is not its business.
//
// Reads are from memory and need nobody: neither a leader nor the disk. A disk
// that fails makes the store say so and wait until it can be opened again, see
// [DiskError]. A [Store] is for any number of goroutines.
package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
	"culvert/internal/pause"
	"culvert/internal/sample"
)

const (
	defaultLease = 30 * time.Second
	defaultReap  = 72 * time.Hour
	// retryDisk is how long after a failure the disk is tried again.
	retryDisk = 10 * time.Second
	// transferTimeout is how long a leader that stops waits for a successor.
	transferTimeout = 2 * time.Second
)

// Options are what a store needs.
type Options struct {
	// Datacenter and Node are those of this sidecar.
	Datacenter, Node string
	// Address is what its siblings dial, host:port.
	Address string
	// DataDir is where it keeps its log and snapshots, in a folder "raft".
	// With "" it forgets everything when it ends, and is the only voter.
	DataDir string
	// Expect is how many servers begin the store together: 1 begins alone at
	// once, 3, 5 and 7 wait for each other, 0 only joins.
	Expect int
	// Neighbours ask siblings over the API. It may be nil where Expect is 1
	// and nobody joins.
	Neighbours Neighbours
	// Join returns the addresses of siblings, host:port; nil is none. It is
	// asked time and again.
	Join func() []string
	// Dial connects to a sibling for raft, and has verified that it is that
	// node. It may be nil in memory.
	Dial func(ctx context.Context, node, address string) (net.Conn, error)
	// Lease is how long an entry is passing without being renewed; 0 is 30 s.
	Lease time.Duration
	// Reap is after how long a critical entry is forgotten; 0 is 72 h.
	Reap time.Duration
	// Log may be nil.
	Log *zap.Logger
	// Metrics may be nil.
	Metrics *Metrics

	snapshotEvery uint64 // 0: snapshotEvery
}

func (o *Options) check() error {
	switch {
	case o.Datacenter == "", o.Node == "", o.Address == "":
		return errors.New("store: Datacenter, Node and Address must be set")
	case !slices.Contains([]int{0, 1, 3, 5, 7}, o.Expect):
		return fmt.Errorf("store: Expect is %d: want 1, 3, 5 or 7, or 0 to only join", o.Expect)
	case o.DataDir == "" && o.Expect != 1:
		return errors.New("store: without DataDir there is one voter: Expect must be 1")
	case o.Dial == nil && o.DataDir != "":
		return errors.New("store: Dial must be set")
	case o.Neighbours == nil && o.Expect != 1:
		return errors.New("store: Neighbours must be set")
	}
	return nil
}

func (o *Options) setDefaults() {
	if o.Join == nil {
		o.Join = func() []string { return nil }
	}
	if o.Lease == 0 {
		o.Lease = defaultLease
	}
	if o.Reap == 0 {
		o.Reap = defaultReap
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	if o.snapshotEvery == 0 {
		o.snapshotEvery = snapshotEvery
	}
	if o.Dial == nil {
		o.Dial = func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("a store in memory has one voter")
		}
	}
}

// A Store is one server's part of the raft group. Make one with [Open].
type Store struct {
	o       Options
	log     *zap.Logger
	metrics *Metrics
	sampler sample.Sampler

	mu      sync.Mutex
	view    *state.State
	index   uint64 // of the entry that view comes from
	changed chan struct{}
	engine  *engine // nil while the disk has failed, and after Close
	failure error   // why there is none
	office  *office // while this node leads
	promise promise
	waiting string // what it waits for before it has begun
	closed  bool
	known   Greeting // what it said of itself when it last could
}

// Open reads what is on the disk. State is of use then; the rest needs Run. A
// disk that cannot be used is no error, if it may be better later: Run tries
// again, and Status tells of it.
func Open(o Options) (*Store, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	o.setDefaults()
	s := &Store{o: o, log: o.Log.Named("store"), metrics: o.Metrics, view: state.New(), changed: make(chan struct{})}
	s.known = Greeting{Node: o.Node, Address: o.Address, Expect: o.Expect, Memory: o.DataDir == ""}
	err := s.reopen()
	if err != nil && lasting(err) {
		return nil, err
	}
	return s, nil
}

// reopen makes an engine, or notes why it could not.
func (s *Store) reopen() error {
	e, err := s.open()
	s.mu.Lock()
	if s.closed && err == nil {
		s.mu.Unlock()
		e.close()
		return nil
	}
	if err != nil && s.failure == nil {
		s.metrics.failed()
	}
	s.engine, s.failure = e, err
	s.mu.Unlock()
	if err != nil {
		if left, ok := s.sampler.Allow("disk"); ok {
			s.log.Error("store cannot be opened: reads go on", zap.Error(err), zap.Int("suppressed", left))
		}
		return err
	}
	return nil
}

// Run takes part until ctx ends, and closes the store. It returns nil.
func (s *Store) Run(ctx context.Context) error {
	defer s.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.observe(ctx) })
	for {
		if e := s.current(); e != nil {
			s.tend(ctx, e)
			if ctx.Err() != nil {
				return nil
			}
			s.log.Error("store has stopped: reads go on, writes are refused", zap.Error(e.disk.failure()))
			s.drop(e)
		}
		if !pause.For(ctx, jitter(retryDisk)) {
			return nil
		}
		if s.reopen() == nil {
			s.log.Info("store is open again", zap.String("path", s.path()))
		}
	}
}

// jitter is d on average: servers that were started together do not stay so.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d) //nolint:gosec // spreads load, guards nothing
}

// Close ends the store. State goes on to answer. It is for a store that was
// never run: Run closes it by itself.
func (s *Store) Close() {
	s.mu.Lock()
	e := s.engine
	s.engine, s.closed = nil, true
	s.mu.Unlock()
	if e != nil {
		e.close()
	}
}

// drop does away with an engine whose disk has failed.
func (s *Store) drop(e *engine) {
	s.mu.Lock()
	s.engine, s.failure = nil, e.disk.failure()
	s.mu.Unlock()
	s.metrics.failed()
	e.close()
}

// current returns the engine, nil if there is none.
func (s *Store) current() *engine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.engine
}

// tend does what a member of a raft group has to, until ctx ends or the disk
// fails.
func (s *Store) tend(ctx context.Context, e *engine) {
	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.begin(inner, e) })
	wg.Go(func() { s.follow(inner, e) })
	select {
	case <-ctx.Done():
		s.handOver(e)
	case <-e.disk.failed:
	}
	cancel()
	wg.Wait()
}

// handOver makes another server lead before this one ends: that is faster than
// to be missed.
func (s *Store) handOver(e *engine) {
	if _, id := e.raft.LeaderWithID(); id != e.self || voters(e.members()) < 2 {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := e.raft.LeadershipTransfer().Error(); err != nil {
			s.log.Debug("leadership was not handed over", zap.Error(err))
		}
	}()
	select {
	case <-done:
		return
	case <-time.After(transferTimeout):
	}
	e.layer.cut() // it leads no more after that
	<-done
}

// ServeConn takes a connection of a sibling for raft, and returns when it is
// closed. The sibling is known by then to be a server of the own datacenter.
// ServeConn closes c.
func (s *Store) ServeConn(ctx context.Context, c net.Conn) {
	e := s.current()
	if e == nil {
		_ = c.Close()
		return
	}
	e.layer.serve(ctx, c)
}

// State is what is known now. After a start it may be what was on the disk, of
// which some was never agreed on: it comes from no store then.
func (s *Store) State() *state.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.view
}

// Changed returns a channel that is closed at the next change. Ask for it before
// State, and no change is missed.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// publish shows what an engine has applied, unless readers have seen more.
func (s *Store) publish(e *engine, st *state.State, index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch was := s.view.Store(); {
	case index < e.target, was != "" && st.Store() == "", was != "" && was == st.Store() && index < s.index:
		return
	}
	s.index = index
	s.set(st)
}

// set must be called with the lock held.
func (s *Store) set(st *state.State) {
	if st == s.view {
		return
	}
	s.view = st
	close(s.changed)
	s.changed = make(chan struct{})
}
