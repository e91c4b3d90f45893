package federation

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/federation/state"
	"culvert/internal/testpki"
)

// A listener reads a stream, line by line, at its own pace.
type listener struct {
	t    *testing.T
	resp *http.Response
	in   *bufio.Reader
}

// listen asks for a stream of what changes since an index of a store.
func listen(t *testing.T, tr http.RoundTripper, store string, index uint64, rest string, header ...string) *listener {
	t.Helper()
	path := fmt.Sprintf("https://server.dc1.consul/v1/federation-states?changes&stream&store=%s&index=%d%s", store, index, rest)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != streamType || resp.Header.Get(StoreHeader) == "" {
		t.Errorf("%d with %v", resp.StatusCode, resp.Header)
	}
	return &listener{t, resp, bufio.NewReader(resp.Body)}
}

// next waits for a message and tells it in words; "" is the stream's end.
func (l *listener) next() string {
	l.t.Helper()
	line, err := l.in.ReadBytes('\n')
	if err == io.EOF && len(line) == 0 {
		return ""
	}
	var m message
	if err == nil {
		err = json.Unmarshal(line, &m)
	}
	if err != nil {
		return err.Error()
	}
	out := fmt.Sprintf("%s %d", m.Store, m.Index)
	if m.Full {
		out += " full"
	}
	for _, raw := range m.Records {
		var r state.Record
		if err := json.Unmarshal(raw, &r); err != nil {
			return err.Error()
		}
		name := " " + r.Datacenter
		if r.Removed {
			name = " -" + r.Datacenter
		}
		out += name
	}
	return out
}

func (l *listener) want(want string) {
	l.t.Helper()
	if got := l.next(); got != want {
		l.t.Errorf("the next message is %q, want %q", got, want)
	}
}

func (l *listener) close() { _ = l.resp.Body.Close() }

// after is what a reader gets of the store S after a change.
func after(s *state.State, records string) string {
	return strings.TrimSpace(fmt.Sprintf("S %d %s", s.Index(), records))
}

func TestStream(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		start := time.Now()
		index := fake.State().Index()
		l := listen(t, tr, "S", index, "&wait=1m")
		l.want(after(fake.State(), "")) // at once, though there is nothing new
		time.Sleep(5 * time.Second)
		fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		l.want(after(fake.State(), "dc2"))
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("told after %v", d)
		}
		fake.do(t, removal(bob().Key()))
		l.want(after(fake.State(), "-dc2"))
		if d := time.Since(start); d > 5*time.Second+streamEvery*11/10 || d < 5*time.Second+streamEvery*9/10 {
			t.Errorf("told of the second after %v", d)
		}
		time.Sleep(time.Second)
		fake.do(t, state.Command{Remove: &state.Removal{Before: time.Now().Add(time.Hour)}}) // no record changes
		l.want(after(fake.State(), ""))
		l.want("") // its time is over
		if d := time.Since(start); d < time.Minute || d > time.Minute+time.Minute/16 {
			t.Errorf("ended after %v", d)
		}
		for _, c := range []struct {
			store, rest string
			index       uint64
			want        string
		}{
			{"S", "&wait=0s", index, after(fake.State(), "-dc2")}, // dc1 has not changed since
			{"T", "&wait=0s", index, after(fake.State(), "full dc1")},
			{"", "&wait=0s", 0, after(fake.State(), "full dc1")},
			{"S", "&wait=0s", 0, after(fake.State(), "dc1 -dc2")},
			{"S", "&wait=0s", index + 100, after(fake.State(), "")}, // who is ahead
		} {
			l := listen(t, tr, c.store, c.index, c.rest)
			l.want(c.want)
			l.want("")
		}
	})
}

// An index that a sidecar has not reached yet is waited for, once it has said so.
func TestStreamOfOneBehind(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		s := fake.State()
		l := listen(t, tr, "S", s.Index()+1, "")
		defer l.close()
		l.want(after(s, ""))
		fake.do(t, state.Command{Critical: []state.Key{bob().Key()}})
		time.Sleep(time.Second)
		fake.do(t, state.Command{Critical: []state.Key{alice().Key()}})
		l.want(after(fake.State(), "dc1"))
	})
}

// What a reader has is compared where it is at the same index, and only there.
func TestStreamCompares(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		s := fake.State()
		for tag, want := range map[string]string{`"x"`: after(s, "full dc1 dc2"), etag(s): after(s, "")} {
			l := listen(t, tr, "S", s.Index(), "&wait=0s", "If-None-Match", tag)
			l.want(want)
			l.want("")
		}
		l := listen(t, tr, "S", s.Index()-1, "&wait=0s", "If-None-Match", `"x"`)
		l.want(after(s, "dc2"))
		l.close()
	})
}

// A stream goes on over a change of stores, and says so.
func TestStreamOfAnotherStore(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		l := listen(t, tr, "S", fake.State().Index(), "")
		defer l.close()
		l.want(after(fake.State(), ""))
		other := stateOf(t, "T", alice())
		fake.set(other)
		l.want(fmt.Sprintf("T %d full dc1", other.Index()))
		time.Sleep(time.Second)
		fake.do(t, state.Command{Register: bob()})
		l.want(fmt.Sprintf("T %d dc2", other.Index()+1))
	})
}

// What changes in a burst comes together: four messages a second, and the last one
// has everything.
func TestStreamCoalesces(t *testing.T) {
	readingBubble(t, func(t *testing.T, fake *fakeStore, tr *http.Transport) {
		const readers = 30
		total := 0
		var mu sync.Mutex
		var wg sync.WaitGroup
		from := fake.State().Index()
		for range readers {
			l := listen(t, tr, "S", from, "&wait=10s")
			wg.Go(func() {
				n, last := 0, ""
				for got := l.next(); got != ""; got = l.next() {
					n, last = n+1, got
				}
				if !strings.HasPrefix(last, fmt.Sprintf("S %d", fake.State().Index())) {
					t.Errorf("the last message is %q", last)
				}
				mu.Lock()
				defer mu.Unlock()
				total += n
			})
		}
		for i := range 500 { // in five seconds
			time.Sleep(10 * time.Millisecond)
			next := *bob().Server
			next.Version = fmt.Sprint(i)
			fake.do(t, state.Command{Register: &state.Registration{Datacenter: "dc2", Server: &next}})
		}
		wg.Wait()
		if total < readers*19 || total > readers*24 {
			t.Errorf("%d messages to %d readers in five seconds", total, readers)
		}
	})
}

// A message is made once for all who get it, and what is kept of them is bounded.
func TestMessagesAreShared(t *testing.T) {
	s := stateOf(t, "S", alice(), bob())
	var m messages
	a, b := m.of(s, position{"S", 2}, false), m.of(s, position{"S", 2}, false)
	if &a[0] != &b[0] {
		t.Error("one message was made twice")
	}
	c, d := m.of(s, position{"T", 7}, false), m.of(s, position{"U", 9}, false)
	if e := m.of(s, position{"S", s.Index()}, true); &c[0] != &d[0] || &c[0] != &e[0] {
		t.Error("all records were encoded twice")
	}
	for i := range uint64(10 * maxMessages) {
		m.of(s, position{"S", i}, false)
	}
	if len(m.made) > maxMessages {
		t.Errorf("%d messages are kept", len(m.made))
	}
	next := apply(t, s, state.Command{Critical: []state.Key{bob().Key()}})
	if f := m.of(next, position{"S", 2}, false); string(f) == string(a) || len(m.made) != 1 {
		t.Errorf("after a change %d messages are kept, and a reader gets %s", len(m.made), f)
	}
}

// A reader that does not read is cut off, and the others hear of everything in
// time.
func TestStreamNobodyReads(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(stateOf(t, "S", alice()))
		api := NewAPI(fake, APIOptions{Datacenter: "dc1", Domain: "consul"})
		ended := make(chan time.Time, 2)
		w.add("alice", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			api.ServeHTTP(w, r)
			ended <- time.Now()
		}))
		deaf := listen(t, w.transport(testpki.Server("dc2", "bob")), "S", 2, "&wait=10m")
		l := listen(t, w.transport(testpki.Server("dc2", "ben")), "S", 2, "&wait=10m")
		l.want(after(fake.State(), ""))
		stuck := time.Now()
		for i := 0; len(ended) == 0 && i < 3000; i++ {
			fake.set(large(t, fake.State(), i))
			began := time.Now()
			if got := l.next(); !strings.HasPrefix(got, fmt.Sprintf("S %d", fake.State().Index())) || time.Since(began) > streamEvery*11/10 {
				t.Fatalf("the other reader got %.80q after %v", got, time.Since(began))
			}
		}
		if len(ended) == 0 {
			t.Fatalf("after %v it was still written to", time.Since(stuck))
		}
		if _, err := io.Copy(io.Discard, deaf.in); err == nil {
			t.Error("the reader that did not read has got everything")
		}
		l.close()
	})
}

// large is a state with records of some 100 KiB after a change.
func large(t *testing.T, s *state.State, version int) *state.State {
	t.Helper()
	next := s
	for i := range 250 {
		reg := server("dc5", fmt.Sprintf("n%03d", i), fmt.Sprintf("127.78.0.%d", 1+i))
		reg.Server.Version = fmt.Sprint(version)
		var err error
		if next, err = next.Apply(s.Index()+1, state.Command{At: time.Now(), Register: reg}); err != nil {
			t.Fatal(err)
		}
		if version > 0 { // one is enough of a change
			break
		}
	}
	return next
}

// A reader that goes away, by giving up its request or with its connection, leaves
// nothing behind.
func TestStreamReaderGoes(t *testing.T) {
	for name, leave := range map[string]func(w *world, l *listener){
		"gives up":        func(_ *world, l *listener) { l.close() },
		"loses the line":  func(w *world, _ *listener) { w.cut("alice") },
		"is told to go":   func(w *world, _ *listener) { w.change("alice", func(h *host) { go h.server.Close() }) },
		"reads to an end": func(*world, *listener) {},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				fake := newFakeStore(stateOf(t, "S", alice()))
				api := NewAPI(fake, APIOptions{Datacenter: "dc1", Domain: "consul"})
				var under sync.WaitGroup
				w.add("alice", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					under.Add(1)
					defer under.Done()
					api.ServeHTTP(w, r)
				}))
				l := listen(t, w.transport(testpki.Server("dc2", "bob")), "S", 2, "&wait=1m")
				l.want(after(fake.State(), ""))
				leave(w, l)
				start := time.Now()
				under.Wait()
				if d := time.Since(start); d > time.Minute+time.Minute/16 || name != "reads to an end" && d != 0 {
					t.Errorf("the stream ended %v later", d)
				}
				if name == "is told to go" || name == "reads to an end" {
					l.want("")
				}
				l.close()
			})
		})
	}
}

// A sidecar that comes to know no leader ends its streams, and begins those of
// whoever asks again with the word to go elsewhere; what the same client writes
// meanwhile has another connection already.
func TestStreamAstray(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(stateOf(t, "S", alice()))
		w.serve("alice", fake, APIOptions{})
		tr := w.transport(testpki.Server("dc2", "bob"))
		l := listen(t, tr, "S", 2, "&wait=1m")
		l.want(after(fake.State(), ""))
		fake.mu.Lock()
		fake.leader = ""
		fake.mu.Unlock()
		start := time.Now()
		l.want("")
		if d := time.Since(start); d < astrayAfter || d > astrayAfter+2*checkEvery {
			t.Errorf("ended %v after the leader was lost", d)
		}
		start = time.Now()
		l = listen(t, tr, "S", 2, "&wait=1m")
		l.want(after(fake.State(), ""))
		synctest.Wait()
		if got := w.dialled(); got != "server.dc1.consul:443" {
			t.Errorf("dialled %q", got)
		}
		ask(t, tr, http.MethodPut, "/v1/federation-state/dc2/servers/bob", entryJSON(t, bob()))
		if got := w.dialled(); got != "server.dc1.consul:443" {
			t.Errorf("dialled %q for a write", got)
		}
		l.want(after(fake.State(), "dc2")) // and goes on for a while
		l.want("")
		if d := time.Since(start); d != astrayWait {
			t.Errorf("the second stream took %v", d)
		}
	})
}

// The same stream is there for tools, over HTTP/1 as well.
func TestStreamOfTheAdminAddress(t *testing.T) {
	fake := newFakeStore(stateOf(t, "S", alice()))
	synctest.Test(t, func(t *testing.T) {
		fake.changed = make(chan struct{})
		pr, pw := io.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "/v1/federation-states?changes&stream", nil)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			ReadHandler(fake, nil).ServeHTTP(&piped{pw, make(http.Header)}, req)
		}()
		l := &listener{t: t, in: bufio.NewReader(pr)}
		l.want(after(fake.State(), "full dc1"))
		fake.do(t, state.Command{Register: bob()})
		l.want(after(fake.State(), "dc2"))
		cancel()
		<-done
	})
}

// piped is a response that is written to a pipe.
type piped struct {
	*io.PipeWriter
	header http.Header
}

func (p *piped) Header() http.Header { return p.header }
func (p *piped) WriteHeader(int)     {}
func (p *piped) Flush()              {}
