package federation

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"culvert/federation/state"
	"culvert/internal/testpki"
)

// A primary that says nothing, or does not come to an end, is given up in time.
func TestFeedIsBoundedInTime(t *testing.T) {
	const wait = time.Minute
	flush := func(w http.ResponseWriter, body string) {
		w.Header().Set("Content-Type", streamType)
		_, _ = io.WriteString(w, body)
		_ = http.NewResponseController(w).Flush()
	}
	const line = `{"store":"S","index":2,"full":false,"records":[]}` + "\n"
	for name, c := range map[string]struct {
		serve http.HandlerFunc
		limit time.Duration
	}{
		"no answer":      {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, streamTimeout},
		"no message":     {func(w http.ResponseWriter, r *http.Request) { flush(w, ""); <-r.Context().Done() }, streamTimeout},
		"half a message": {func(w http.ResponseWriter, r *http.Request) { flush(w, line[:9]); <-r.Context().Done() }, streamTimeout},
		"only one":       {func(w http.ResponseWriter, r *http.Request) { flush(w, line); <-r.Context().Done() }, wait + wait/16 + streamTimeout},
		"more and more": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				flush(w, line)
				time.Sleep(time.Second)
			}
		}, wait + wait/16 + streamTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.add("alice", c.serve)
				start := time.Now()
				f, err := w.client(testpki.Gateway("dc2", "gw2"), false).stream(t.Context(), stateOf(t, "S", alice()), wait)
				for err == nil {
					_, err = f.next()
				}
				if f != nil {
					f.close()
				}
				if !errors.Is(err, errLate) || time.Since(start) != c.limit || !strings.Contains(err.Error(), "server.dc1.consul") {
					t.Errorf("after %v: %v", time.Since(start), err)
				}
			})
		})
	}
}

// A primary that sends faster than was agreed is read no faster, and one that ends
// each stream at once is not asked without a pause.
func TestReplicaSetsThePace(t *testing.T) {
	for name, c := range map[string]struct {
		serve       http.HandlerFunc
		least, most float64 // messages in ten seconds
	}{
		"many at once": {answersStream(strings.Repeat(`{"store":"S","index":2,"full":true,"records":[]}`+"\n", 1000)), 70, 81},
		"one each":     {answersStream(`{"store":"S","index":2,"full":true,"records":[]}` + "\n"), 35, 46},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.add("alice", c.serve)
				x := &following{w: w, t: t}
				x.start()
				time.Sleep(10 * time.Second)
				if n := testutil.ToFloat64(x.metrics.reads.WithLabelValues("ok")); n < c.least || n > c.most {
					t.Errorf("%v messages in ten seconds", n)
				}
				x.stop()
			})
		})
	}
}

// A primary that is started again while somebody follows is followed again, with
// what has changed meanwhile.
func TestPrimaryRestarted(t *testing.T) {
	follows(t, stateOf(t, "S", alice(), bob()), func(t *testing.T, x *following) {
		for range 3 {
			x.w.change("alice", func(h *host) { go h.server.Close() })
			synctest.Wait()
			x.store.do(t, state.Command{Critical: []state.Key{bob().Key()}})
			api := NewAPI(x.store, APIOptions{Datacenter: "dc1", Domain: "consul"})
			x.w.add("alice", api)
			time.Sleep(2 * retryFirst)
			x.want("dc1/alice dc2/bob!")
			x.store.do(t, state.Command{Register: bob()})
			x.want("dc1/alice dc2/bob")
		}
	})
}

// However the bytes of a stream come, they are the same messages; a stream that
// ends amid one is told from one that ends between two.
func FuzzFeed(f *testing.F) {
	for _, seed := range feedSeeds(f) {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, err := feedOf(t, bytes.NewReader(b))
		single, errSingle := feedOf(t, iotest.OneByteReader(bytes.NewReader(b)))
		if fmt.Sprint(whole, err) != fmt.Sprint(single, errSingle) {
			t.Fatalf("%q is %v, %v, and byte for byte %v, %v", b, whole, err, single, errSingle)
		}
		if len(whole) > bytes.Count(b, []byte("\n")) {
			t.Fatalf("%q has %d messages", b, len(whole))
		}
		if err == nil && (len(whole) == 0 || b[len(b)-1] != '\n') {
			t.Fatalf("%q has come to an end", b)
		}
	})
}

func feedSeeds(t testing.TB) []string {
	one := string(message{Store: "S", Index: 7, Full: true, Records: stateOf(t, "S", alice(), bob()).All()}.encode())
	two := string(message{Store: "S", Index: 8}.encode())
	return []string{one, one + two, one + two[:9], "", "\n", "null\n", "{}\n{}", two + "<html>\n", strings.Repeat(" ", 5000) + two}
}

func TestFeedSeeds(t *testing.T) {
	seeds := feedSeeds(t)
	for i, want := range []int{1, 2, 1, 0, 0, 1, 1, 1, 1} {
		if got, err := feedOf(t, strings.NewReader(seeds[i])); len(got) != want {
			t.Errorf("%q has %d messages, then %v", seeds[i], len(got), err)
		}
	}
}

// feedOf reads a stream to its end.
func feedOf(t testing.TB, r io.Reader) (all []message, err error) {
	t.Helper()
	f := &feed{in: bufio.NewReader(r), rest: time.Hour, late: time.NewTimer(time.Hour)}
	f.ctx, f.cancel = context.WithCancelCause(t.Context())
	defer f.close()
	for {
		m, err := f.next()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, m)
	}
}
