package federation

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap/zaptest/observer"

	"culvert/federation/state"
	"culvert/internal/testpki"
)

// A following is a replica of a fake store, under way.
type following struct {
	w       *world
	t       *testing.T
	store   *fakeStore
	replica *Replica
	metrics *Metrics
	logs    *observer.ObservedLogs
	folder  Folder
	asked   atomic.Int32 // questions
	stop    func()
}

// follows runs f with a replica of a store, which has seen what is there.
func follows(t *testing.T, s *state.State, f func(t *testing.T, x *following)) {
	t.Helper()
	dir := t.TempDir()
	bubble(t, func(t *testing.T, w *world) {
		folder, err := OpenFolder(filepath.Join(dir, "data"))
		if err != nil {
			t.Fatal(err)
		}
		x := &following{w: w, t: t, store: newFakeStore(s), folder: folder}
		api := NewAPI(x.store, APIOptions{Datacenter: "dc1", Domain: "consul"})
		w.add("alice", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x.asked.Add(1)
			api.ServeHTTP(w, r)
		}))
		x.start()
		defer func() { x.stop() }()
		time.Sleep(time.Second) // the next question may follow at once
		f(t, x)
	})
}

// start starts the replica, as a process that begins does.
func (x *following) start() {
	log, logs := observed()
	client := x.w.client(testpki.Gateway("dc2", "gw2"), false)
	x.logs, x.metrics = logs, NewMetrics(nil)
	x.replica = NewReplica(ReplicaOptions{Client: client, Folder: x.folder, Log: log, Metrics: x.metrics})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := x.replica.Run(ctx); err != nil {
			x.t.Error(err)
		}
	}()
	x.stop = func() { cancel(); <-done }
	synctest.Wait()
}

// known are the entries that a state has, an exclamation mark after the critical
// ones.
func known(s *state.State) string {
	var out []string
	for _, r := range s.Records() {
		for _, sv := range r.Servers {
			out = append(out, r.Datacenter+"/"+sv.Node+mark(sv.Health))
		}
		for _, g := range r.Gateways {
			out = append(out, r.Datacenter+"/"+g.Name+mark(g.Health))
		}
	}
	return strings.Join(out, " ")
}

func mark(h state.Health) string {
	if h == state.Critical {
		return "!"
	}
	return ""
}

// want waits for as long as changes may wait for each other.
func (x *following) want(want string) {
	x.t.Helper()
	time.Sleep(streamEvery * 11 / 10)
	synctest.Wait()
	if got := known(x.replica.State()); got != want {
		x.t.Errorf("the replica knows %q, want %q", got, want)
	}
}

func TestReplicaFollows(t *testing.T) {
	follows(t, stateOf(t, "S", gw1(), alice(), bob()), func(t *testing.T, x *following) {
		x.want("dc1/alice dc1/gw1 dc2/bob")
		changed := x.replica.Changed()
		x.store.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		x.want("dc1/alice dc1/gw1 dc2/bob!")
		select {
		case <-changed:
		default:
			t.Error("nobody was told of the change")
		}
		time.Sleep(time.Second)
		x.store.do(t, state.Command{Register: server("dc3", "carol", "127.77.3.1")})
		x.want("dc1/alice dc1/gw1 dc2/bob! dc3/carol")
		time.Sleep(time.Second)
		x.store.do(t, removal(bob().Key())) // the last of its datacenter
		x.want("dc1/alice dc1/gw1 dc3/carol")
		if s := x.replica.State(); s.Record("dc2") != nil || s.Store() != "S" || s.Index() != x.store.State().Index() || s.Hash() != x.store.State().Hash() {
			t.Errorf("the replica has %s at %d", s.Store(), s.Index())
		}
		if st := x.replica.Status(); st.LastError != "" || st.Contact.IsZero() {
			t.Errorf("%+v", st)
		}
		if got := lines(x.logs); got != "" {
			t.Errorf("logged %q", got)
		}
		if n := testutil.ToFloat64(x.metrics.entries.WithLabelValues("servers", "passing")); n != 2 {
			t.Errorf("%v servers are shown", n)
		}
	})
}

// What happens in a burst comes together, and soon.
func TestReplicaRate(t *testing.T) {
	follows(t, stateOf(t, "S", bob()), func(t *testing.T, x *following) {
		time.Sleep(time.Second)
		read := testutil.ToFloat64(x.metrics.reads.WithLabelValues("ok"))
		x.asked.Store(0)
		for i := range 100 {
			next := *bob().Server
			next.Version = strings.Repeat("x", 1+i%2)
			x.store.do(t, state.Command{Register: &state.Registration{Datacenter: "dc2", Server: &next}})
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(streamEvery * 11 / 10)
		if n := testutil.ToFloat64(x.metrics.reads.WithLabelValues("ok")) - read; n < 4 || n > 6 || x.asked.Load() > 1 {
			t.Errorf("%v messages in a second, by %d questions", n, x.asked.Load())
		}
		if x.replica.State().Index() != x.store.State().Index() {
			t.Errorf("it has %d of %d", x.replica.State().Index(), x.store.State().Index())
		}
	})
}

// An index that moves while no record changes, as when a departure is forgotten,
// is taken: the replica does not ask again and again.
func TestReplicaTakesTheIndex(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		x.store.do(t, removal(bob().Key()))
		time.Sleep(2 * time.Second)
		x.store.do(t, state.Command{Remove: &state.Removal{Before: time.Now().Add(time.Hour)}})
		synctest.Wait()
		x.asked.Store(0)
		time.Sleep(10 * time.Second)
		if n := x.asked.Load(); n > 2 || x.replica.State().Index() != x.store.State().Index() {
			t.Errorf("asked %d times, and is at %d of %d", n, x.replica.State().Index(), x.store.State().Index())
		}
	})
}

// A full compare repairs what is different here for whatever reason.
func TestReplicaRepairs(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		time.Sleep(time.Second)
		x.replica.mu.Lock()
		spoilt, err := x.replica.pure.With("S", x.replica.pure.Index(), stateOf(t, "S", server("dc2", "bob", "127.77.9.9")).All(), true)
		if err != nil {
			t.Fatal(err)
		}
		x.replica.pure = spoilt
		x.replica.mu.Unlock()
		x.replica.show()
		x.want("dc2/bob")
		time.Sleep(compareEvery * 5 / 4) // both ends spread it: 1.1 by 17/16 at most, and the next question
		x.want("dc1/alice dc2/bob")
		if x.replica.State().Hash() != x.store.State().Hash() || testutil.ToFloat64(x.metrics.repairs) != 1 {
			t.Error("not repaired, or not counted")
		}
		if got := lines(x.logs); got != "records differ from the primary's at one index: repaired" {
			t.Errorf("logged %q", got)
		}
		time.Sleep(10 * compareEvery)
		if got := lines(x.logs); got != "" || testutil.ToFloat64(x.metrics.repairs) != 1 {
			t.Errorf("repaired again: %q", got)
		}
	})
}

// The old store is lost. Its entries count until their owners have had the time to
// register again.
func TestStoreReplaced(t *testing.T) {
	rob := func() *state.Registration { return server("dc2", "rob", "127.77.2.1") } // has bob's address
	follows(t, stateOf(t, "S", alice(), bob(), gw1(), server("dc3", "carol", "127.77.3.1")), func(t *testing.T, x *following) {
		x.want("dc1/alice dc1/gw1 dc2/bob dc3/carol")
		x.store.set(stateOf(t, "T", alice()))
		x.want("dc1/alice dc1/gw1 dc2/bob dc3/carol")
		if s := x.replica.State(); s.Store() != "" {
			t.Errorf("records of two stores are said to be of %q", s.Store())
		}
		if got := lines(x.logs); got != "primary has another store: what only the old one had is kept for a while" {
			t.Errorf("logged %q", got)
		}
		time.Sleep(time.Minute)
		x.store.do(t, state.Command{Register: server("dc3", "carol", "127.77.3.1")})
		time.Sleep(time.Second)
		x.store.do(t, removal(state.Key{Datacenter: "dc3", Kind: state.KindServer, Name: "carol"})) // what leaves has left
		x.want("dc1/alice dc1/gw1 dc2/bob")
		time.Sleep(time.Minute)
		x.store.do(t, state.Command{Register: rob()}) // what the store says of an address counts
		x.want("dc1/alice dc1/gw1 dc2/rob")
		time.Sleep(holdOver - 2*time.Minute - 5*time.Second)
		x.want("dc1/alice dc1/gw1 dc2/rob")
		time.Sleep(DefaultWait + 10*time.Second)
		x.want("dc1/alice dc2/rob")
		if x.replica.State().Store() != "T" {
			t.Errorf("the records are of %q", x.replica.State().Store())
		}
	})
}

// What is held over survives a restart as well.
func TestHeldOverOnDisk(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		x.store.set(stateOf(t, "T", alice()))
		time.Sleep(5 * time.Second)
		x.stop()
		x.start()
		x.want("dc1/alice dc2/bob")
		time.Sleep(holdOver + DefaultWait + 10*time.Second)
		x.want("dc1/alice")
		x.stop()
		x.store.set(state.New())
		x.start()
		x.want("dc1/alice")
	})
}

// A sidecar of the primary that was just started answers before it knows what of
// its disk counts, or with nothing at all. That is no other store.
func TestSidecarOfNoStore(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		s := x.store.State()
		older, err := state.New().With("", s.Index()-1, stateOf(t, "S", alice()).All(), true)
		if err != nil {
			t.Fatal(err)
		}
		same, err := state.New().With("", s.Index(), s.All(), true)
		if err != nil {
			t.Fatal(err)
		}
		for _, none := range []*state.State{older, same, state.New()} {
			x.store.set(none)
			time.Sleep(3 * time.Second)
			x.want("dc1/alice dc2/bob")
			if st := x.replica.Status(); st.LastError != errNoStore.Error() {
				t.Errorf("%+v", st)
			}
			time.Sleep(2 * compareEvery)
			x.store.set(s)
			time.Sleep(3 * time.Second)
			x.want("dc1/alice dc2/bob")
			if st := x.replica.Status(); st.LastError != "" || x.replica.State() == none || x.replica.State().Store() != "S" {
				t.Errorf("%+v, of %q", st, x.replica.State().Store())
			}
		}
		x.store.do(t, removal(bob().Key()))
		x.want("dc1/alice") // nothing was held over
		if got := lines(x.logs); strings.Contains(got, "another store") {
			t.Errorf("logged %s", got)
		}
	})
}

// A replica that has nothing takes what there is, and all of the store once there
// is one.
func TestProvisional(t *testing.T) {
	s := stateOf(t, "S", alice(), bob())
	none, err := state.New().With("", s.Index(), s.All(), true)
	if err != nil {
		t.Fatal(err)
	}
	follows(t, state.New(), func(t *testing.T, x *following) {
		x.asked.Store(0)
		time.Sleep(20 * time.Second)
		if n := x.asked.Load(); n > 14 {
			t.Errorf("asked who has no store %d times in 20 s", n)
		}
		x.want("")
		x.store.set(none)
		time.Sleep(3 * time.Second)
		x.want("dc1/alice dc2/bob")
		if st := x.replica.Status(); st.LastError != "" {
			t.Errorf("%+v", st)
		}
		time.Sleep(5 * time.Minute)
		x.store.set(apply(t, s, removal(bob().Key()))) // bob was never agreed upon
		x.want("dc1/alice")
		if x.replica.State().Store() != "S" {
			t.Errorf("of %q", x.replica.State().Store())
		}
	})
}

// Who answers may be behind whom was asked before.
func TestFollowerBehind(t *testing.T) {
	s := stateOf(t, "S", alice(), bob())
	older := stateOf(t, "S", alice())
	follows(t, s, func(t *testing.T, x *following) {
		x.store.set(older)
		time.Sleep(5 * compareEvery)
		x.want("dc1/alice dc2/bob")
		if x.replica.State().Index() != s.Index() || testutil.ToFloat64(x.metrics.repairs) != 0 {
			t.Errorf("went back to %d", x.replica.State().Index())
		}
		x.store.set(apply(t, s, state.Command{Critical: []state.Key{bob().Key()}}))
		x.want("dc1/alice dc2/bob!")
	})
}

// A primary that answers what makes no sense changes nothing.
func TestWrongAnswers(t *testing.T) {
	all := string(slices.Concat([]byte("["), stateOf(t, "S", server("dc9", "eve", "127.77.9.9")).All()[0], []byte("]")))
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(stateOf(t, "S", alice(), bob()))
		api := NewAPI(fake, APIOptions{Datacenter: "dc1", Domain: "consul"})
		var wrong atomic.Pointer[http.HandlerFunc]
		x := &following{w: w, t: t}
		w.add("alice", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if h := wrong.Load(); h != nil && r.URL.Query().Has("stream") {
				x.asked.Add(1)
				(*h)(w, r)
				return
			}
			api.ServeHTTP(w, r)
		}))
		x.start()
		defer func() { x.stop() }()
		x.want("dc1/alice dc2/bob")
		good := fmt.Sprintf(`{"store":"S","index":99,"full":true,"records":%s}`, all)
		for name, h := range map[string]http.HandlerFunc{
			"nothing":             answersStream(""),
			"an empty line":       answersStream("\n"),
			"null":                answersStream("null\n"),
			"no keys":             answersStream("{}\n"),
			"other types":         answersStream(`{"store":1,"index":"99","full":true,"records":{}}` + "\n"),
			"an older index":      answersStream(`{"store":"S","index":1,"full":false,"records":` + all + "}\n"),
			"all of an older one": answersStream(`{"store":"S","index":1,"full":true,"records":` + all + "}\n"),
			"no index":            answersStream(`{"store":"S","full":false,"records":` + all + "}\n"),
			"garbage":             answersStream("<html>\n"),
			"an array":            answersStream(all + "\n"),
			"half a message":      answersStream(good[:len(good)-2] + "\n"),
			"one without an end":  answersStream(good),
			"no stream":           answers(200, nil, good+"\n"),
			"an error":            answers(500, http.Header{"Content-Type": {streamType}}, good+"\n"),
			"not modified":        answers(304, http.Header{"Content-Type": {streamType}}, ""),
			"a redirect":          answers(307, http.Header{"Content-Type": {streamType}}, good+"\n"),
			"changes of others":   answersStream(`{"store":"T","index":99,"full":false,"records":` + all + "}\n"),
		} {
			wrong.Store(&h)
			w.cut("alice")
			time.Sleep(10 * time.Second)
			x.want("dc1/alice dc2/bob")
			if n := x.asked.Swap(0); n > 50 {
				t.Errorf("%s: asked %d times in 10 s", name, n)
			}
			if x.replica.State().Store() != "S" {
				t.Errorf("%s: of %q", name, x.replica.State().Store())
			}
			wrong.Store(nil)
			time.Sleep(2 * time.Minute)
			x.want("dc1/alice dc2/bob")
		}
	})
}

// answersStream serves a stream, right or wrong.
func answersStream(body string) http.HandlerFunc {
	return answers(200, http.Header{"Content-Type": {streamType}}, body)
}

// Records that are not possible are left out, one by one, and told.
func TestImpossibleRecords(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		good := string(stateOf(t, "S", bob()).All()[0])
		bad := strings.Replace(strings.ReplaceAll(good, `"dc2"`, `"dc3"`), "127.77.2.1", "0.0.0.0", 1)
		w.add("alice", answersStream(`{"store":"S","index":7,"full":true,"records":[`+good+","+bad+"]}\n"))
		x := &following{w: w, t: t}
		x.start()
		x.want("dc2/bob")
		x.stop()
		e := x.logs.All()[0]
		if cause := e.ContextMap()["error"].(string); e.Message != "records of the primary that cannot be used are left out" || !strings.Contains(cause, `"dc3"`) {
			t.Errorf("logged %q: %s", e.Message, cause)
		}
	})
}

func TestPrimaryAwayAndBack(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		for _, away := range []time.Duration{time.Second, 5 * time.Minute} {
			x.w.change("alice", func(h *host) { h.down = true })
			x.w.cut("alice")
			time.Sleep(away)
			x.want("dc1/alice dc2/bob")
			if st := x.replica.Status(); !strings.Contains(st.LastError, "connection refused") {
				t.Errorf("%+v", st)
			}
			x.w.change("alice", func(h *host) { h.down = false })
			time.Sleep(retryMost * 11 / 10)
			synctest.Wait()
			if st := x.replica.Status(); st.LastError != "" {
				t.Errorf("%v after it is back: %+v", retryMost, st)
			}
			told := slices.Compact(strings.Split(lines(x.logs), "\n")) // the silence again and again
			if got := strings.Join(told, "\n"); got != "primary does not answer: going on with what is known\nprimary answers" {
				t.Errorf("logged %q", got)
			}
		}
		if n := testutil.ToFloat64(x.metrics.reads.WithLabelValues("error")); n < 100 || n > 250 {
			t.Errorf("asked %v times in vain", n)
		}
	})
}
