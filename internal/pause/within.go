package pause

import (
	"context"
	"sync"
	"time"
)

// Within is [context.WithTimeout] for what mostly is over before anybody has asked
// for Done: there is no timer until then.
func Within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	w := &within{Context: ctx, deadline: time.Now().Add(d)}
	if parent, ok := ctx.Deadline(); ok && parent.Before(w.deadline) {
		w.deadline = parent
	}
	return w, w.cancel
}

type within struct {
	context.Context // the parent
	deadline        time.Time

	mu       sync.Mutex
	timed    context.Context //nolint:containedctx // the one that has a timer; nil until it is needed
	stop     context.CancelFunc
	canceled bool // before its deadline, and before there was a timer
}

func (w *within) Deadline() (time.Time, bool) { return w.deadline, true }

func (w *within) Done() <-chan struct{} { return w.get().Done() }

func (w *within) Err() error {
	if err := w.Context.Err(); err != nil || time.Now().Before(w.deadline) && !w.hasTimed() {
		return err
	}
	return w.get().Err()
}

// get returns the context that has a timer.
func (w *within) get() context.Context {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timed == nil {
		if w.canceled {
			w.timed, w.stop = context.WithCancel(w.Context)
			w.stop()
		} else {
			w.timed, w.stop = context.WithDeadline(w.Context, w.deadline)
		}
	}
	return w.timed
}

func (w *within) hasTimed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.timed != nil || w.canceled
}

func (w *within) cancel() {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.timed != nil:
		w.stop()
	case time.Now().Before(w.deadline):
		w.canceled = true
	}
}
