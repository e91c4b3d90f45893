package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
	"culvert/internal/pause"
)

const (
	// tick is how often the leader looks at its clocks.
	tick = time.Second
	// tidyEvery is how often it looks for what is to be forgotten.
	tidyEvery = time.Minute
	// lateTick is when a leader has slept, and not those that it did not hear:
	// leases are longer by what a tick was late.
	lateTick = 3 * time.Second

	warningTime = 3 * time.Minute
	maxWarned   = 256 // holders
	maxWarnings = 4   // a holder
)

// An office is what a leader keeps in memory. Who leads next begins anew: every
// entry has a whole lease.
type office struct {
	engine *engine

	mu     sync.Mutex
	leases map[state.Key]time.Time // when they run out
	warned map[state.Key][]warning // by who is to be told
}

type warning struct {
	text string
	at   time.Time
}

// follow waits to be elected, and leads then, until ctx ends.
func (s *Store) follow(ctx context.Context, e *engine) {
	leads := false
	for ctx.Err() == nil {
		if leads {
			leads = s.reign(ctx, e)
			continue
		}
		select {
		case <-ctx.Done():
		case leads = <-e.raft.LeaderCh():
		}
	}
}

// reign leads until raft says something else, or ctx ends. It tells whether this
// node was elected again.
func (s *Store) reign(ctx context.Context, e *engine) (again bool) {
	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { s.lead(inner, e) })
	select {
	case <-ctx.Done():
	case again = <-e.raft.LeaderCh():
	}
	cancel()
	wg.Wait()
	s.log.Info("store is not led by this server any more")
	return again
}

// lead does a leader's work until ctx ends.
func (s *Store) lead(ctx context.Context, e *engine) {
	for {
		err := s.takeOffice(ctx, e)
		if err == nil {
			break
		}
		s.log.Debug("leader is not ready", zap.Error(err))
		if !pause.For(ctx, tick/5) {
			return
		}
	}
	st := e.fsm.load()
	o := &office{engine: e, leases: make(map[state.Key]time.Time), warned: make(map[state.Key][]warning)}
	s.mu.Lock()
	s.office = o
	s.mu.Unlock()
	s.log.Info("store is led by this server", zap.String("store", st.Store()), zap.Uint64("index", st.Index()))
	defer func() {
		s.mu.Lock()
		s.office = nil
		s.mu.Unlock()
	}()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.keepMembers(ctx, e) })
	s.keepClocks(ctx, e, o)
}

// takeOffice makes sure that all that former leaders have acknowledged is
// applied here. The first command of a leader is written even if it changes
// nothing: those that have started anew learn by it which entries count.
func (s *Store) takeOffice(ctx context.Context, e *engine) error {
	if err := e.raft.Barrier(enqueueTimeout).Error(); err != nil {
		return fmt.Errorf("wait for former entries: %w", err)
	}
	c := state.Command{At: time.Now(), Remove: &state.Removal{Before: time.Now().Add(-s.o.Reap)}}
	if st := e.fsm.load(); st.Store() == "" {
		c = state.Command{At: time.Now(), Found: newID()}
	}
	_, err := e.apply(ctx, c)
	return err
}

// keepClocks marks entries whose leases run out, and forgets old ones.
func (s *Store) keepClocks(ctx context.Context, e *engine, o *office) {
	last := time.Now()
	var tidied time.Time
	o.extend(entries(e), s.o.Lease, last)
	for pause.For(ctx, tick) {
		now := time.Now()
		if late := now.Sub(last) - tick; late > lateTick {
			o.postpone(late)
		}
		last = now
		all := entries(e)
		o.extend(all, s.o.Lease, now)
		if gone := o.expired(all, now); len(gone) > 0 {
			s.command(ctx, e, state.Command{Critical: gone}, "entries are critical: their owners do not renew them", gone)
		}
		if now.Sub(tidied) >= tidyEvery {
			tidied = now
			old := reapable(all, now.Add(-s.o.Reap))
			s.command(ctx, e, state.Command{Remove: &state.Removal{Keys: old, Before: now.Add(-s.o.Reap)}}, "entries are forgotten", old)
		}
	}
}

// command writes what the leader has decided. What fails is decided again at a
// later tick.
func (s *Store) command(ctx context.Context, e *engine, c state.Command, what string, keys []state.Key) {
	_, changed, err := s.write(ctx, e, c)
	names := make([]string, 0, 10)
	for _, k := range keys[:min(len(keys), cap(names))] {
		names = append(names, k.String())
	}
	switch {
	case err != nil:
		s.log.Debug(what, zap.Error(err))
	case changed && len(keys) > 0:
		s.log.Info(what, zap.Int("entries", len(keys)), zap.Strings("first", names))
	}
}

// An entry's clock.
type clock struct {
	health state.Health
	since  time.Time
}

func entries(e *engine) map[state.Key]clock {
	st := e.fsm.load()
	all := make(map[state.Key]clock)
	for _, r := range st.Records() {
		for i := range r.Servers {
			sv := &r.Servers[i]
			all[state.Key{Datacenter: r.Datacenter, Kind: state.KindServer, Name: sv.Node}] = clock{sv.Health, sv.Since}
		}
		for i := range r.Gateways {
			g := &r.Gateways[i]
			all[state.Key{Datacenter: r.Datacenter, Kind: state.KindGateway, Name: g.Name}] = clock{g.Health, g.Since}
		}
	}
	return all
}

func reapable(all map[state.Key]clock, before time.Time) []state.Key {
	var out []state.Key
	for k, c := range all {
		if c.health == state.Critical && c.since.Before(before) {
			out = append(out, k)
		}
	}
	return out
}

// extend gives a lease to the passing entries that have none, and takes those
// away that no entry has.
func (o *office) extend(all map[state.Key]clock, lease time.Duration, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k, c := range all {
		if _, ok := o.leases[k]; !ok && c.health == state.Passing {
			o.leases[k] = now.Add(lease)
		}
	}
	// A lease that was just granted may be for an entry that is younger than
	// all: it is given another one then.
	maps.DeleteFunc(o.leases, func(k state.Key, _ time.Time) bool { return all[k].health != state.Passing })
}

func (o *office) postpone(late time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k, t := range o.leases {
		o.leases[k] = t.Add(late)
	}
}

func (o *office) expired(all map[state.Key]clock, now time.Time) []state.Key {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []state.Key
	for k := range all {
		if t, ok := o.leases[k]; ok && !now.Before(t) {
			out = append(out, k)
		}
	}
	return out
}

func (o *office) renew(k state.Key, lease time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.leases[k] = time.Now().Add(lease)
}

func (o *office) forget(keys []state.Key) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, k := range keys {
		delete(o.leases, k)
		delete(o.warned, k)
	}
}

// warn keeps for the holder of a name or address that somebody else wants it.
func (o *office) warn(c *state.ConflictError, reg *state.Registration) {
	if c.Reason == state.ConflictLeft {
		return
	}
	var where string
	if reg.Server != nil {
		where = reg.Server.Address
	} else {
		where = reg.Gateway.Address
	}
	text := fmt.Sprintf("another process, at %s, tried to register as %s and was refused", where, c.Key)
	if c.Reason == state.ConflictAddress {
		text = fmt.Sprintf("%s, at %s, tried to register with this server's address %s and was refused", c.Key, where, reg.Server.Advertise)
	}
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, known := o.warned[c.Holder]; !known && len(o.warned) >= maxWarned {
		maps.DeleteFunc(o.warned, func(_ state.Key, ws []warning) bool { return len(fresh(ws, now)) == 0 })
		if len(o.warned) >= maxWarned {
			return
		}
	}
	ws := fresh(o.warned[c.Holder], now)
	if i := slices.IndexFunc(ws, func(w warning) bool { return w.text == text }); i >= 0 {
		ws[i].at = now
	} else if len(ws) < maxWarnings {
		ws = append(ws, warning{text, now})
	}
	o.warned[c.Holder] = ws
}

func fresh(ws []warning, now time.Time) []warning {
	return slices.DeleteFunc(ws, func(w warning) bool { return now.Sub(w.at) > warningTime })
}

// warnings returns what a holder has to know, once: who wants its name goes on
// to try.
func (o *office) warnings(k state.Key) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	ws := fresh(o.warned[k], time.Now())
	delete(o.warned, k)
	var out []string
	for _, w := range ws {
		out = append(out, w.text)
	}
	return out
}
