package capture

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/capture/ruleset"
	"culvert/internal/pause"
)

// How often a guard looks, where nothing tells it to.
const (
	lookInterval = 10 * time.Second
	// settle is the least time between two looks: rules of others change many
	// at a time.
	settle = 100 * time.Millisecond
	// retryAfter is when what has failed is tried again.
	retryAfter = time.Second
)

// guard sees to it that the rules are there and that what they turn arrives,
// until ctx ends.
func (r *Redirect) guard(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	changed, probe := make(chan struct{}, 1), make(chan struct{}, 1)
	wg.Go(func() { r.watch(ctx, changed) })
	wg.Go(func() { r.probes(ctx, probe) })
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		var again <-chan time.Time
		if !r.repair() {
			again = time.After(retryAfter)
		}
		if !pause.For(ctx, settle) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-again:
		case <-changed:
			signal(probe)
		}
	}
}

// signal leaves a token, unless there is one.
func signal(to chan<- struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// watch tells of each change of the host's rules.
func (r *Redirect) watch(ctx context.Context, changed chan<- struct{}) {
	for {
		w, err := ruleset.Watch()
		if err == nil {
			stop := context.AfterFunc(ctx, func() { _ = w.Close() })
			signal(changed) // what has happened before
			for err == nil {
				if err = w.Wait(); err == nil {
					signal(changed)
				}
			}
			stop()
			_ = w.Close()
		}
		if ctx.Err() != nil {
			return
		}
		r.log.Warn("the host does not tell of changes of its rules: they are looked at now and then", zap.Error(err))
		if !pause.For(ctx, retryAfter) {
			return
		}
	}
}

// repair makes the table anew where somebody else has changed it. What the
// operator has let go (culvert capture clear ADDRESS) stays so. It reports false
// where it could not.
func (r *Redirect) repair() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return true
	}
	err := r.restore()
	was := r.trouble
	r.trouble = ""
	if err != nil {
		r.trouble = err.Error()
		if r.trouble != was {
			r.log.Error("the rules of redirect cannot be kept", zap.String("table", r.table.Name()), zap.Error(err))
		}
	}
	return err == nil
}

// restore looks at the table and makes it anew if it has to. Called with mu held.
func (r *Redirect) restore() error {
	found, err := r.table.Read()
	if errors.Is(err, ruleset.ErrDamaged) { // or it was changed while it was read
		found, err = r.table.Read()
	}
	if err != nil && !errors.Is(err, ruleset.ErrNoTable) && !errors.Is(err, ruleset.ErrDamaged) {
		return err
	}
	if err == nil && maps.Equal(found.Peers, r.state.Peers) {
		for at, name := range r.state.Lost {
			if _, there := found.Lost[at]; !there {
				r.log.Warn("an address is not refused any more: it was taken out of the table", zap.Stringer("address", at), zap.String("peer", name))
			}
		}
		r.state.Lost = found.Lost
		r.o.Metrics.setLost(len(found.Lost))
		return nil
	}
	if err == nil {
		err = errors.New("its peers are not those that were put there")
	}
	r.o.Metrics.countRepair()
	r.log.Warn("somebody has changed the rules of redirect: they are made anew", zap.String("table", r.table.Name()), zap.Error(err))
	return r.table.Replace(r.state)
}
