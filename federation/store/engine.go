package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"culvert/federation/state"
)

const (
	// A leader that is gone is missed after one to two of these.
	electionTimeout = time.Second
	// A leader that hears of no majority for this long leads no more.
	leaderLease = 500 * time.Millisecond
	// maxBatch is how many entries one sync may be for.
	maxBatch = 256
	// A snapshot is taken after that many entries, and as many stay in the
	// log for followers that are a little behind.
	snapshotEvery = 4096
	// enqueueTimeout is how long a write may wait for the ones before it.
	enqueueTimeout = 5 * time.Second
)

// An engine is raft with all that it needs, from when its disk was opened to
// when it failed or the store was closed.
type engine struct {
	self  raft.ServerID
	disk  *disk
	layer *layer
	trans *transport
	fsm   *fsm
	raft  *raft.Raft
	// target is the last command on the disk: what is before it was shown to
	// readers already.
	target uint64

	ready atomic.Bool // raft is set

	mu      sync.Mutex
	shut    bool
	applies sync.WaitGroup
}

// open starts raft on what is on the disk.
func (s *Store) open() (*engine, error) {
	self := raftAddress(s.o.Node, s.o.Address)
	l := newLayer(self, s.o.Dial)
	e := &engine{self: raft.ServerID(s.o.Node), layer: l}
	g := newGuard(s.path(), l.cut)
	var err error
	if s.o.DataDir == "" {
		e.disk = openMemory(g)
	} else {
		e.disk, err = openDisk(s.path(), g, s.log)
	}
	if e.disk != nil {
		s.show(e.disk)
	}
	if err != nil {
		if e.disk != nil {
			err = errors.Join(err, e.disk.close())
		}
		return nil, diskError(s.path(), err)
	}
	log := newHCLog(s.log.Named("raft"))
	e.fsm = &fsm{log: s.log, guard: g, state: state.New(), publish: func(st *state.State, index uint64) { s.publish(e, st, index) }}
	e.trans = newTransport(l, addresses{s, e}, log)
	if e.target, err = lastCommand(e.disk); err == nil {
		e.raft, err = newRaft(s.config(log), e)
	}
	if failure := g.failure(); err == nil {
		err = failure
	}
	if err != nil {
		e.close()
		return nil, diskError(s.path(), err)
	}
	e.ready.Store(true)
	e.fsm.open()
	return e, nil
}

func diskError(path string, err error) error {
	if already, ok := errors.AsType[*DiskError](err); ok {
		return already
	}
	return &DiskError{Path: path, Err: err}
}

func (s *Store) path() string {
	if s.o.DataDir == "" {
		return "memory"
	}
	return filepath.Join(s.o.DataDir, "raft")
}

func (s *Store) config(log *hcLog) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(s.o.Node)
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = electionTimeout, electionTimeout, leaderLease
	c.MaxAppendEntries = maxBatch
	c.SnapshotThreshold, c.TrailingLogs, c.SnapshotInterval = s.o.snapshotEvery, s.o.snapshotEvery, 30*time.Second
	c.ShutdownOnRemove = false // it may be added again
	c.NoLegacyTelemetry = true
	c.Logger = log
	return c
}

// newRaft makes an error of the panics that raft has for a damaged disk.
func newRaft(c *raft.Config, e *engine) (r *raft.Raft, err error) {
	defer func() {
		if p := recover(); p != nil {
			r, err = nil, fmt.Errorf("start raft: %v", p)
		}
	}()
	r, err = raft.NewRaft(c, e.fsm, e.disk, e.disk, e.disk.snaps, e.trans)
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	return r, nil
}

// lastCommand finds the last entry of the log that is a command, 0 if there is
// none.
func lastCommand(d *disk) (uint64, error) {
	first, err := d.FirstIndex()
	last, err2 := d.LastIndex()
	if err := errors.Join(err, err2); err != nil || last == 0 {
		return 0, err
	}
	for i := last; i >= first; i-- {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return 0, err
		}
		if l.Type == raft.LogCommand {
			return i, nil
		}
	}
	return 0, nil
}

// show lets readers have what is on the disk before the others have said how
// much of it counts. Some of the last entries may never have been agreed upon, so
// it comes from no store: nobody asks for changes since it.
func (s *Store) show(d *disk) {
	st, _ := state.New().With("", 0, nil, true)
	if d.bolt != nil {
		st = d.latest()
		st, _ = state.New().With("", st.Index(), st.All(), true) // it was checked when it was read
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.Store() == "" && st.Len() > 0 {
		s.set(st)
	}
}

// latest is the state of the last snapshot and all entries after it.
func (d *disk) latest() *state.State {
	st, index := state.New(), uint64(0)
	list, err := d.snaps.List()
	if err != nil {
		return st
	}
	for _, meta := range list {
		_, r, err := d.snaps.Open(meta.ID)
		if err != nil {
			continue
		}
		old, err := loadState(r)
		_ = r.Close()
		if err == nil {
			st, index = old, meta.Index
			break
		}
	}
	last, err := d.LastIndex()
	if err != nil {
		return st
	}
	for i := index + 1; i <= last; i++ {
		var l raft.Log
		if d.GetLog(i, &l) == nil && l.Type == raft.LogCommand {
			if next, _ := fold(st, &l); next != nil {
				st = next
			}
		}
	}
	return st
}

// apply puts a command into the log and returns the state's index when it is
// applied. A command whose ctx ends may be applied nevertheless.
func (e *engine) apply(ctx context.Context, c state.Command) (uint64, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	if !e.enter() {
		return 0, raft.ErrRaftShutdown
	}
	done := make(chan applied, 1)
	go e.wait(b, done)
	select {
	case a := <-done:
		return a.index, a.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// enter keeps close from ending raft until applies.Done is called. It reports
// false when that has begun already.
func (e *engine) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.shut {
		e.applies.Add(1)
	}
	return !e.shut
}

// wait is apart from apply because raft's futures know no context. close waits
// for it.
func (e *engine) wait(command []byte, done chan<- applied) {
	defer e.applies.Done()
	f := e.raft.Apply(command, enqueueTimeout)
	if err := f.Error(); err != nil {
		done <- applied{err: err}
		return
	}
	a, ok := f.Response().(applied)
	if !ok {
		a.err = errors.New("raft gave no answer") // cannot be: ApplyBatch answers all commands
	}
	done <- a
}

// members is raft's configuration, as it is now.
func (e *engine) members() []raft.Server {
	f := e.raft.GetConfiguration()
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

// begun tells whether this node belongs to a store.
func (e *engine) begun() bool { return e.raft.LastIndex() > 0 || len(e.members()) > 0 }

// close ends raft, and then closes its files. Writes that wait are answered
// before: raft forgets them when it ends.
func (e *engine) close() {
	e.layer.cut()
	e.mu.Lock()
	e.shut = true
	e.mu.Unlock()
	if e.raft != nil {
		e.applies.Wait()
		_ = e.raft.Shutdown().Error() // it has none
	}
	_ = e.trans.Close() // nor has this
	if err := e.disk.close(); err != nil && e.disk.failure() == nil {
		e.fsm.log.Warn("close log", zap.Error(err))
	}
}

// addresses tells raft where its members are: as they registered, or else as
// they were added.
type addresses struct {
	store  *Store
	engine *engine
}

// ServerAddr implements [raft.ServerAddressProvider].
func (a addresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	if id == a.engine.self {
		return a.engine.layer.self, nil
	}
	st := a.engine.fsm.load()
	if r := st.Record(a.store.o.Datacenter); r != nil {
		if sv, ok := r.Server(string(id)); ok {
			return raftAddress(sv.Node, sv.Address), nil
		}
	}
	if a.engine.ready.Load() {
		for _, m := range a.engine.members() {
			if m.ID == id {
				return m.Address, nil
			}
		}
	}
	return "", fmt.Errorf("%s is no member: %w", id, syscall.EHOSTUNREACH)
}
