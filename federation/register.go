package federation

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/sample"
)

const (
	// renewEvery is how often a lease is renewed: three times before it runs out.
	renewEvery = 10 * time.Second
	// repairEvery is how soon an entry that differs is put right again.
	repairEvery = time.Second
	// registerRetry is how soon a registration that came to nothing is tried
	// again, at first, and registerRetryMost at most.
	registerRetry     = 250 * time.Millisecond
	registerRetryMost = 3 * time.Second
	// warnAgain is for how long a warning has to have been away to be news.
	warnAgain = 5 * time.Minute
)

// A Registry takes entries: a [Client] is one, and so is the store of a process
// that leads it.
type Registry interface {
	Register(ctx context.Context, r state.Registration) (store.Lease, error)
}

// RegistrarOptions configure a [Registrar].
type RegistrarOptions struct {
	Registry Registry
	Source   Source                     // where the entry is seen when it has arrived
	Entry    func() *state.Registration // what is to be registered now
	Log      *zap.Logger                // nil means no log
	Metrics  *Metrics                   // nil means none
}

// A Registrar keeps the entry of its own process registered: it renews it, and
// repairs it when it is not as it should be.
type Registrar struct {
	o       RegistrarOptions
	log     *zap.Logger
	sampler sample.Sampler

	// Run's alone.
	told   string               // of what went wrong, "" if nothing did
	warned map[string]time.Time // when a warning came last

	mu     sync.Mutex
	status RegistrarStatus
}

// RegistrarStatus is how the own entry stands.
type RegistrarStatus struct {
	Renewed   time.Time // when it was registered last, zero before the first time
	LastError string    // of the last try, "" if it succeeded
	Left      bool      // it was taken away, and stays so until the process is started again
}

// NewRegistrar returns a registrar that has registered nothing.
func NewRegistrar(o RegistrarOptions) *Registrar {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	return &Registrar{o: o, log: o.Log.Named("federation"), warned: make(map[string]time.Time)}
}

// Status tells how the entry stands.
func (r *Registrar) Status() RegistrarStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// Run keeps the entry registered until ctx ends, and returns nil. It does not
// take it away then: a restart is no farewell.
func (r *Registrar) Run(ctx context.Context) error {
	retry := registerRetry
	for ctx.Err() == nil {
		err := r.register(ctx)
		if left(err) {
			r.log.Warn("this process has left the federation; start it again to come back", zap.Error(err))
			<-ctx.Done()
			return nil
		}
		wait := jitter(renewEvery)
		if err != nil && !refused(err) {
			wait = jitter(retry)
			retry = min(2*retry, registerRetryMost)
		} else {
			retry = registerRetry
		}
		r.wait(ctx, wait, err == nil)
	}
	return nil
}

// left tells whether the entry was taken away from this process.
func left(err error) bool {
	if answer, ok := errors.AsType[*AnswerError](err); ok {
		return answer.Code == http.StatusGone
	}
	conflict, ok := errors.AsType[*state.ConflictError](err)
	return ok && conflict.Reason == state.ConflictLeft
}

// refused tells a no from a question that came to nothing: asking again at once
// would get the same answer.
func refused(err error) bool {
	if answer, ok := errors.AsType[*AnswerError](err); ok {
		return answer.Code != http.StatusServiceUnavailable
	}
	_, ok := errors.AsType[*state.ConflictError](err)
	return ok || errors.Is(err, state.ErrFull)
}

// register registers once, and keeps and tells how that went.
func (r *Registrar) register(ctx context.Context) error {
	lease, err := r.o.Registry.Register(ctx, *r.o.Entry())
	if ctx.Err() != nil {
		return err
	}
	r.o.Metrics.registered(err == nil)
	r.mu.Lock()
	first := r.status.Renewed.IsZero()
	r.status.LastError = ""
	if err != nil {
		r.status.LastError = err.Error()
		r.status.Left = left(err)
	} else {
		r.status.Renewed = time.Now()
	}
	r.mu.Unlock()
	r.tell(lease, first, err)
	return err
}

// tell logs how a registration went: each trouble once, and that it is over.
func (r *Registrar) tell(lease store.Lease, first bool, err error) {
	switch {
	case left(err): // Run has the word
	case err != nil && r.told == err.Error():
	case err != nil:
		kind, level := "registration did not get through", zap.WarnLevel
		if refused(err) {
			kind, level = "registration refused", zap.ErrorLevel
		}
		if suppressed, ok := r.sampler.Allow(kind); ok {
			r.told = err.Error()
			r.log.Log(level, kind, zap.Error(err), zap.Int("suppressed", suppressed))
		}
	case first:
		r.log.Info("registered", zap.Stringer("entry", r.o.Entry().Key()), zap.Uint64("index", lease.Index))
	case r.told != "":
		r.log.Info("registered again", zap.Uint64("index", lease.Index))
	}
	if err == nil {
		r.told = ""
	}
	now := time.Now()
	maps.DeleteFunc(r.warned, func(_ string, last time.Time) bool { return now.Sub(last) >= warnAgain })
	for _, w := range lease.Warnings {
		if _, known := r.warned[w]; !known {
			r.log.Warn("the federation warns", zap.String("detail", w))
		}
		r.warned[w] = now
	}
}

// wait returns when the lease has to be renewed, or earlier if the entry was
// registered and is not as it should be.
func (r *Registrar) wait(ctx context.Context, d time.Duration, registered bool) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	soonest := time.After(repairEvery)
	var seen bool
	for {
		changed := r.o.Source.Changed()
		if s := r.o.Source.State(); registered && soonest == nil {
			has := s.Has(r.o.Entry())
			if seen && !has {
				return // it was there, and somebody has changed it
			}
			seen = seen || has
		}
		select {
		case <-soonest:
			soonest = nil
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
