package federation

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
	"culvert/internal/pause"
)

const (
	// compareEvery is how often all records are compared with the primary's: at
	// the beginning of each stream. Where something changes at that very moment
	// it is done at the next.
	compareEvery = time.Minute
	// askEvery is how often the primary is asked at most, and readEvery how
	// often a message of its is read: it sends no more than one in streamEvery.
	askEvery  = 250 * time.Millisecond
	readEvery = streamEvery / 2
	// retryFirst and retryMost are how long is waited after a question that
	// came to nothing.
	retryFirst = 200 * time.Millisecond
	retryMost  = 2 * time.Second
	// warnEvery is how often the log tells, at most, that nobody answers.
	warnEvery = 30 * time.Second
	// saveEvery is how often records are written to disk at most.
	saveEvery = time.Second
	// holdOver is how long the records of a store that was replaced by another
	// go on to count where that has none: after the loss of a store its owners
	// need some time to register again.
	holdOver = 10 * time.Minute
)

// ReplicaOptions configure a [Replica].
type ReplicaOptions struct {
	Client *Client
	Folder Folder
	// Known is what is known at first, in place of what the folder has. Nil
	// reads the folder.
	Known   *state.State
	Log     *zap.Logger // nil means no log
	Metrics *Metrics    // nil means none
}

// A Replica follows the primary's store: it knows what was there last, keeps
// that on disk, and goes on with it while the primary is away.
type Replica struct {
	o   ReplicaOptions
	log *zap.Logger

	mu   sync.Mutex
	pure *state.State // as the primary told
	// provisional is where a sidecar told it that did not know by then what of
	// it counts: it was better than nothing.
	provisional bool
	before      *state.State // of another store, held over; nil for none
	until       time.Time    // when before counts no more
	shown       *state.State // what others see
	changed     chan struct{}
	contact     time.Time // of the last message
	failure     string    // of the last question, "" if it was answered
	warned      time.Time // when the log last told of a failure
	told        bool      // since the last answer it has
}

var (
	errNoStore    = errors.New("the sidecar of the primary that answered does not know the store yet")
	errWrongStore = errors.New("the primary answered with changes of a store that it was not asked about")
)

// ReplicaStatus is how a replica stands to the primary.
type ReplicaStatus struct {
	Contact   time.Time // of the last message, zero before the first
	LastError string    // of the last question, "" if it was answered
}

// NewReplica returns a replica of what is on disk. A file that cannot be read is
// told and left alone: the primary has all of it.
func NewReplica(o ReplicaOptions) *Replica {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	r := &Replica{o: o, log: o.Log.Named("federation"), changed: make(chan struct{})}
	s, err := o.Known, error(nil)
	if s == nil {
		s, err = o.Folder.Load()
	}
	if err != nil {
		r.log.Error("records on disk cannot be read: starting without them", zap.Error(err))
	}
	r.pure, r.shown = s, s
	o.Metrics.Show(s)
	return r
}

// State returns what is known now.
func (r *Replica) State() *state.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.shown
}

// Changed returns a channel that is closed at the next change.
func (r *Replica) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Status tells how the replica stands to the primary.
func (r *Replica) Status() ReplicaStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return ReplicaStatus{r.contact, r.failure}
}

// Run follows the primary until ctx ends, and returns nil.
func (r *Replica) Run(ctx context.Context) error {
	saved := make(chan struct{})
	onDisk := r.State() // before anything can change it
	go func() {
		defer close(saved)
		r.keep(ctx, onDisk)
	}()
	defer func() { <-saved }()
	retry := retryFirst
	for ctx.Err() == nil {
		began := time.Now()
		read, err := r.follow(ctx, jitter(compareEvery))
		if read > 0 {
			retry = retryFirst
		}
		if err == nil {
			pause.For(ctx, jitter(askEvery)-time.Since(began))
			continue
		}
		r.note(ctx, err)
		pause.For(ctx, jitter(retry))
		retry = min(2*retry, retryMost)
	}
	return nil
}

// note keeps how the last question ended. It tells of the first failure, of those
// that follow every 30 s at most, and of the answer that ends them.
func (r *Replica) note(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	warn, answers := false, false
	if err != nil {
		r.failure = err.Error()
		if warn = time.Since(r.warned) >= warnEvery; warn {
			r.warned, r.told = time.Now(), true
		}
	} else {
		r.failure, r.contact = "", time.Now()
		answers, r.told = r.told, false
	}
	r.mu.Unlock()
	r.o.Metrics.read(err == nil)
	if warn {
		r.log.Warn("primary does not answer: going on with what is known", zap.Error(err))
	}
	if answers {
		r.log.Info("primary answers")
	}
}

// follow reads one stream, of about the length that is asked for, and applies what
// comes. It tells how many messages it has taken.
func (r *Replica) follow(ctx context.Context, wait time.Duration) (read int, err error) {
	f, err := r.o.Client.stream(ctx, r.last(), wait)
	if err != nil {
		return 0, err
	}
	defer f.close()
	for {
		m, err := f.next()
		if err == io.EOF { //nolint:errorlint // it is never wrapped here
			return read, nil
		}
		if err == nil {
			err = r.take(m)
		}
		if err != nil {
			return read, err
		}
		read++
		r.note(ctx, nil)
		pause.For(ctx, readEvery)
	}
}

// last is what the primary told last.
func (r *Replica) last() *state.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pure
}

// take applies a message.
func (r *Replica) take(m message) error {
	s := r.last()
	if err := r.usable(s, m); err != nil {
		return err
	}
	same := m.Store == s.Store() && m.Index == s.Index()
	if m.Store == s.Store() && m.Index < s.Index() || same && !m.Full && len(m.Records) == 0 {
		r.expire() // nothing new, or who answered has not caught up yet
		return nil
	}
	if same && m.Full {
		r.log.Warn("records differ from the primary's at one index: repaired", zap.Uint64("index", m.Index))
		r.o.Metrics.repaired()
	}
	r.apply(s, m)
	return nil
}

// usable tells why an answer cannot be taken. A sidecar of the primary that was
// just started, or has not begun, answers as of no store: what is known here is
// worth more.
func (r *Replica) usable(s *state.State, m message) error {
	switch {
	case m.Store == "" && (s.Store() != "" || s.Len() > 0 && !r.provisional || m.Index == 0):
		return errNoStore
	case m.Store != s.Store() && !m.Full:
		return errWrongStore
	}
	return nil
}

// apply makes what was read the state.
func (r *Replica) apply(s *state.State, m message) {
	next, err := s.With(m.Store, m.Index, m.Records, m.Full)
	if err != nil {
		r.log.Warn("records of the primary that cannot be used are left out", zap.Error(err))
	}
	r.mu.Lock()
	if m.Store != s.Store() && s.Len() > 0 && !r.provisional {
		r.before, r.until = r.shown, time.Now().Add(holdOver)
		r.log.Warn("primary has another store: what only the old one had is kept for a while",
			zap.String("old", s.Store()), zap.String("new", m.Store), zap.Duration("kept", holdOver))
	}
	r.pure, r.provisional = next, m.Store == ""
	r.mu.Unlock()
	r.show()
}

// expire ends the time of what is held over.
func (r *Replica) expire() {
	r.mu.Lock()
	over := r.before != nil && time.Now().After(r.until)
	r.mu.Unlock()
	if over {
		r.show()
	}
}

// show makes what is known what others see. What the new store has once had is no
// more held over: if it goes there, it has gone.
func (r *Replica) show() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shown = r.pure
	if r.before != nil {
		r.before = r.before.Without(r.pure)
		if r.before.Len() > 0 && time.Now().Before(r.until) {
			r.shown = r.pure.Over(r.before)
		} else {
			r.before = nil
		}
	}
	close(r.changed)
	r.changed = make(chan struct{})
	r.o.Metrics.Show(r.shown)
}

// keep writes changes to disk until ctx ends, and the last ones then. kept is
// what is there.
func (r *Replica) keep(ctx context.Context, kept *state.State) {
	failed := ""
	for {
		changed := r.Changed()
		if s := r.State(); s != kept {
			err := r.o.Folder.Save(s)
			switch {
			case err == nil:
				kept, failed = s, ""
			case failed != err.Error():
				failed = err.Error()
				r.log.Error("records are not kept on disk: make room, or see to the permissions", zap.Error(err))
			}
		}
		if failed == "" {
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
		if !pause.For(ctx, saveEvery) && kept == r.State() {
			return
		}
		if ctx.Err() != nil && failed != "" {
			return
		}
	}
}

// jitter is d, give or take a tenth, so that processes do not ask in step.
func jitter(d time.Duration) time.Duration {
	return d*9/10 + rand.N(d/5) //nolint:gosec // spreads load
}
