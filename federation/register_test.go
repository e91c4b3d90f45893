package federation

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap/zaptest/observer"

	"culvert/federation/state"
	"culvert/federation/store"
)

// A registering is a registrar of bob under way, with a store that is its source as
// well.
type registering struct {
	store   *fakeStore
	reg     *Registrar
	metrics *Metrics
	logs    *observer.ObservedLogs

	mu    sync.Mutex
	entry *state.Registration
	times []time.Time // of registrations
}

func (x *registering) Register(ctx context.Context, r state.Registration) (store.Lease, error) {
	x.mu.Lock()
	x.times = append(x.times, time.Now())
	x.mu.Unlock()
	return x.store.Register(ctx, r)
}

// taken returns and forgets how much time was between registrations.
func (x *registering) taken() []time.Duration {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []time.Duration
	for i := 1; i < len(x.times); i++ {
		out = append(out, x.times[i].Sub(x.times[i-1]))
	}
	x.times = nil
	return out
}

// registers runs f with a registrar of a store that takes what it is given.
func registers(t *testing.T, f func(t *testing.T, x *registering)) {
	t.Helper()
	registersWith(t, nil, f)
}

// registersWith is registers with a store that says no at first.
func registersWith(t *testing.T, no error, f func(t *testing.T, x *registering)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		log, logs := observed()
		x := &registering{store: newFakeStore(stateOf(t, "S")), metrics: NewMetrics(nil), logs: logs, entry: bob()}
		x.store.fail(no)
		x.reg = NewRegistrar(RegistrarOptions{Registry: x, Source: x.store, Log: log, Metrics: x.metrics, Entry: func() *state.Registration {
			x.mu.Lock()
			defer x.mu.Unlock()
			return x.entry
		}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := x.reg.Run(ctx); err != nil {
				t.Error(err)
			}
		}()
		f(t, x)
		cancel()
		<-done
	})
}

func TestRenews(t *testing.T) {
	registers(t, func(t *testing.T, x *registering) {
		time.Sleep(10 * time.Minute)
		times := x.taken()
		if len(times) < 55 || len(times) > 66 {
			t.Errorf("renewed %d times in ten minutes", len(times))
		}
		if least, most := slices.Min(times), slices.Max(times); least < renewEvery*9/10 || most > renewEvery*11/10 || most-least < renewEvery/20 {
			t.Errorf("renewed every %v to %v", least, most)
		}
		st := x.reg.Status()
		if st.Left || st.LastError != "" || time.Since(st.Renewed) > renewEvery*11/10 {
			t.Errorf("%+v", st)
		}
		if got := lines(x.logs); got != "registered" {
			t.Errorf("logged %q", got)
		}
	})
}

func TestRetries(t *testing.T) {
	conflict := &state.ConflictError{Reason: state.ConflictName, Key: bob().Key(), Detail: "another process has it"}
	for name, c := range map[string]struct {
		err         error
		first, last time.Duration // between tries
		said        string
	}{
		"no answer":     {errors.New("connection refused"), registerRetry, registerRetryMost, "registration did not get through"},
		"no leader":     {&AnswerError{Code: http.StatusServiceUnavailable, Message: "no leader"}, registerRetry, registerRetryMost, "registration did not get through"},
		"store has not": {&store.NotLeaderError{}, registerRetry, registerRetryMost, "registration did not get through"},
		"not the owner": {&AnswerError{Code: http.StatusForbidden, Message: "no"}, renewEvery, renewEvery, "registration refused"},
		"conflict":      {&AnswerError{Code: http.StatusConflict, Message: "no"}, renewEvery, renewEvery, "registration refused"},
		"full":          {&AnswerError{Code: http.StatusInsufficientStorage, Message: "no"}, renewEvery, renewEvery, "registration refused"},
		"own conflict":  {conflict, renewEvery, renewEvery, "registration refused"},
		"own is full":   {fmt.Errorf("register: %w", state.ErrFull), renewEvery, renewEvery, "registration refused"},
	} {
		t.Run(name, func(t *testing.T) {
			registersWith(t, c.err, func(t *testing.T, x *registering) {
				time.Sleep(2 * time.Minute)
				times := x.taken()
				about := func(d, want time.Duration) bool { return d >= want*9/10 && d <= want*11/10 }
				if first, last := times[0], times[len(times)-1]; !about(first, c.first) || !about(last, c.last) {
					t.Errorf("tried again after %v, and at last %v", first, last)
				}
				if st := x.reg.Status(); st.LastError != c.err.Error() || st.Left || !st.Renewed.IsZero() {
					t.Errorf("%+v", st)
				}
				if got := lines(x.logs); got != c.said {
					t.Errorf("logged %q", got)
				}
				if n := testutil.ToFloat64(x.metrics.registrations.WithLabelValues("error")); int(n) != len(times)+1 {
					t.Errorf("counted %v", n)
				}
				x.store.fail(nil)
				time.Sleep(renewEvery * 11 / 10)
				if st := x.reg.Status(); st.LastError != "" || st.Renewed.IsZero() {
					t.Errorf("%+v", st)
				}
				if got := lines(x.logs); got != "registered" {
					t.Errorf("logged %q", got)
				}
				x.store.fail(errors.New("once more"))
				time.Sleep(time.Minute)
				x.store.fail(nil)
				time.Sleep(time.Minute)
				if got := lines(x.logs); got != "registration did not get through\nregistered again" {
					t.Errorf("logged %q", got)
				}
			})
		})
	}
}

// Another trouble is told as well, but not each of many.
func TestTroublesAreTold(t *testing.T) {
	registersWith(t, errors.New("trouble 0"), func(t *testing.T, x *registering) {
		for i := range 100 {
			x.store.fail(fmt.Errorf("trouble %d", i/50))
			time.Sleep(time.Second)
		}
		if n := x.logs.Len(); n != 2 {
			t.Errorf("%d lines: %s", n, lines(x.logs))
		}
		x.logs.TakeAll()
		for i := range 100 {
			x.store.fail(fmt.Errorf("read from port %d", i))
			time.Sleep(time.Second)
		}
		if n := x.logs.Len(); n < 5 || n > 11 {
			t.Errorf("%d lines: %s", n, lines(x.logs))
		}
	})
}

// An entry that somebody has changed is put right in a second, and one that was
// taken away, too: a lease that ran out is no farewell.
func TestRepairs(t *testing.T) {
	other := bob()
	other.Server.Address = "10.9.9.9:8443"
	for name, spoil := range map[string]func(t *testing.T, x *registering){
		"critical": func(t *testing.T, x *registering) {
			x.store.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		},
		"changed": func(t *testing.T, x *registering) { x.store.do(t, state.Command{Register: other}) },
		"lost": func(t *testing.T, x *registering) {
			x.store.do(t, state.Command{Remove: &state.Removal{Keys: []state.Key{bob().Key()}}})
		},
		"another store": func(t *testing.T, x *registering) { x.store.set(stateOf(t, "T")) },
	} {
		t.Run(name, func(t *testing.T) {
			registers(t, func(t *testing.T, x *registering) {
				time.Sleep(3 * time.Second)
				for range 3 {
					spoil(t, x)
					time.Sleep(repairEvery)
					synctest.Wait()
					if !x.store.State().Has(bob()) {
						t.Errorf("after a second: %s", known(x.store.State()))
					}
					time.Sleep(2 * time.Second)
				}
			})
		})
	}
}

// Where another fights for the same entry, the two do not wear out the store.
func TestRepairsAreRare(t *testing.T) {
	registers(t, func(t *testing.T, x *registering) {
		time.Sleep(3 * time.Second)
		x.taken()
		for range 1000 {
			x.store.do(t, state.Command{Critical: []state.Key{bob().Key()}})
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(x.taken()); n > 11 {
			t.Errorf("registered %d times in ten seconds", n)
		}
	})
}

// A source that does not have the entry yet is no reason to repair it.
func TestSourceIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := newFakeStore(stateOf(t, "S"))
		x := &registering{store: newFakeStore(stateOf(t, "S"))}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		r := NewRegistrar(RegistrarOptions{Registry: x, Source: late, Entry: bob})
		go func() {
			for ctx.Err() == nil {
				time.Sleep(100 * time.Millisecond)
				late.do(t, state.Command{Register: server("dc3", "x"+fmt.Sprint(time.Now().UnixMilli()), "127.77.3.1"), At: time.Now()})
				late.set(stateOf(t, "S", alice()))
			}
		}()
		_ = r.Run(ctx)
		if n := len(x.taken()); n != 0 {
			t.Errorf("registered %d times more", n)
		}
		synctest.Wait()
		time.Sleep(time.Second)
	})
}

// The configuration may say something new while it runs.
func TestEntryChanges(t *testing.T) {
	registers(t, func(t *testing.T, x *registering) {
		time.Sleep(3 * time.Second)
		next := bob()
		next.Server.Version = "0.2.0"
		x.mu.Lock()
		x.entry = next
		x.mu.Unlock()
		time.Sleep(renewEvery * 11 / 10)
		if sv, _ := x.store.State().Record("dc2").Server("bob"); sv.Version != "0.2.0" {
			t.Errorf("%+v", sv)
		}
	})
}

// What was taken away stays away until the process is started again.
func TestLeft(t *testing.T) {
	for name, gone := range map[string]error{
		"by the API": &AnswerError{Code: http.StatusGone, Message: "it has left"},
		"by itself":  &state.ConflictError{Reason: state.ConflictLeft, Detail: "it has left"},
	} {
		t.Run(name, func(t *testing.T) {
			registers(t, func(t *testing.T, x *registering) {
				time.Sleep(5 * time.Second)
				x.logs.TakeAll()
				x.store.fail(gone)
				time.Sleep(renewEvery)
				x.taken()
				time.Sleep(time.Hour)
				if n := len(x.taken()); n != 0 {
					t.Errorf("tried again %d times", n)
				}
				if st := x.reg.Status(); !st.Left || st.LastError != "it has left" || st.Renewed.IsZero() {
					t.Errorf("%+v", st)
				}
				if got := lines(x.logs); got != "this process has left the federation; start it again to come back" {
					t.Errorf("logged %q", got)
				}
			})
		})
	}
}

// A warning is told once for as long as it goes on.
func TestWarnings(t *testing.T) {
	registers(t, func(t *testing.T, x *registering) {
		warn := func(w ...string) { x.store.mu.Lock(); x.store.warnings = w; x.store.mu.Unlock() }
		warn("rob wants your address")
		time.Sleep(time.Hour)
		warn("rob wants your address", "ben wants your name")
		time.Sleep(time.Minute)
		warn()
		time.Sleep(warnAgain + time.Minute)
		warn("ben wants your name")
		time.Sleep(time.Minute)
		var got []string
		for _, e := range x.logs.FilterMessage("the federation warns").All() {
			got = append(got, e.ContextMap()["detail"].(string))
		}
		if want := "rob wants your address, ben wants your name, ben wants your name"; strings.Join(got, ", ") != want {
			t.Errorf("told %q", got)
		}
	})
}
