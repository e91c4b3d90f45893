package federation

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/testpki"
)

// elsewhere sends whoever writes to a place, or to one after another, the last
// for good.
func elsewhere(locations ...string) http.HandlerFunc {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.Header().Set("Location", locations[0]+r.URL.RequestURI())
		if len(locations) > 1 {
			locations = locations[1:]
		}
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

func TestFollowsToTheLeader(t *testing.T) {
	for _, c := range []struct {
		name   string
		direct bool
		leader string // where it is dialled
	}{
		{"by its name", false, "amy.server.dc1.consul:443"},
		{"at its address", true, "amy.lan:8443"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				follower, leader := newFakeStore(stateOf(t, "S")), newFakeStore(stateOf(t, "S"))
				follower.fail(&store.NotLeaderError{Node: "amy", Address: "amy.lan:8443"})
				w.serve("alice", follower, APIOptions{})
				w.serve("amy", leader, APIOptions{})
				client := w.client(testpki.Server("dc1", "art"), c.direct)
				for range 2 { // the leader is remembered
					if _, err := client.Register(t.Context(), *server("dc1", "art", "127.77.1.3")); err != nil {
						t.Fatal(err)
					}
				}
				if err := client.Remove(t.Context(), bob().Key()); err != nil {
					t.Error(err)
				}
				if err := client.RemovePeer(t.Context(), "x"); err != nil {
					t.Error(err)
				}
				if got := w.dialled(); got != "server.dc1.consul:443 "+c.leader {
					t.Errorf("dialled %s", got)
				}
				if a, b := follower.asked(), leader.asked(); a != "register dc1/art" || b != "register dc1/art, register dc1/art, remove [dc2/bob] true, remove peer x" {
					t.Errorf("asked the follower to %q, the leader to %q", a, b)
				}
			})
		})
	}
}

// An answer leads to servers of the primary alone.
func TestRefusesToGoElsewhere(t *testing.T) {
	for _, location := range []string{
		"https://bob.server.dc2.consul", "https://amy.gateway.dc1.consul", "https://server.dc1.consul", "https://evil.example",
		"https://amy.server.dc1.nomad", "https://10.0.0.1:8443", "https://amy.server.dc1.consul.evil.example", "//", "", "https://%zz",
		"https://amy.server.dc1.consul@evil.example", "https://" + strings.Repeat("x", 5000),
	} {
		bubble(t, func(t *testing.T, w *world) {
			w.add("alice", elsewhere(location))
			_, err := w.client(testpki.Server("dc2", "bob"), false).Register(t.Context(), *bob())
			if err == nil || len(err.Error()) > 2*maxMessage {
				t.Errorf("sent to %q: %v", location, err)
			}
			if got := w.dialled(); got != "server.dc1.consul:443" {
				t.Errorf("sent to %q, dialled %s", location, got)
			}
		})
	}
}

// An address that a client is told is one of the own network, and no name that
// leads to somebody else, nor anything that a URL would read differently.
func TestLeaderAddress(t *testing.T) {
	for address, want := range map[string]string{
		"10.71.0.12:8443":           "https://10.71.0.12:8443",
		"[fd00::1]:8443":            "https://[fd00::1]:8443",
		"amy.lan:8443":              "https://amy.lan:8443",
		"":                          "https://amy.server.dc1.consul",
		"10.71.0.12":                "https://amy.server.dc1.consul",
		"bob.server.dc2.consul:443": "https://amy.server.dc1.consul",
		"evil@10.71.0.12:8443":      "https://amy.server.dc1.consul",
		"10.71.0.12/x:8443":         "https://amy.server.dc1.consul",
		"10.71.0.12:8443/x":         "https://amy.server.dc1.consul",
	} {
		c := NewClient(ClientOptions{Primary: "dc1", Domain: "consul", Direct: true})
		h := http.Header{"Location": {"https://amy.server.dc1.consul/x"}}
		h.Set(LeaderHeader, address)
		if got, err := c.follow(&answer{header: h}); got != want || err != nil {
			t.Errorf("with the address %q: %q, %v, want %q", address, got, err, want)
		}
	}
}

// A leader that is gone is asked for no longer than it takes to notice, however
// it has gone.
func TestLeaderGoes(t *testing.T) {
	for name, c := range map[string]struct {
		gone   func(w *world, leader *fakeStore)
		within time.Duration
	}{
		"refuses": {func(w *world, _ *fakeStore) { w.change("amy", func(x *host) { x.down = true }); w.cut("amy") }, 0},
		"vanishes": {func(w *world, _ *fakeStore) {
			w.change("amy", func(x *host) { x.silent = true })
			w.cut("amy")
			synctest.Wait()
		}, leaderTimeout},
		"full disk":  {func(_ *world, leader *fakeStore) { leader.fail(&store.DiskError{Path: "/x", Err: errors.New("full")}) }, 0},
		"knows none": {func(_ *world, leader *fakeStore) { leader.fail(&store.NotLeaderError{}) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				follower, leader := newFakeStore(stateOf(t, "S")), newFakeStore(stateOf(t, "S"))
				follower.fail(&store.NotLeaderError{Node: "amy"})
				w.serve("alice", follower, APIOptions{})
				w.serve("amy", leader, APIOptions{})
				client := w.client(testpki.Server("dc2", "bob"), false)
				if _, err := client.Register(t.Context(), *bob()); err != nil {
					t.Fatal(err)
				}
				c.gone(w, leader)
				follower.fail(nil) // it leads now
				start := time.Now()
				if _, err := client.Register(t.Context(), *bob()); err != nil {
					t.Error(err)
				}
				if d := time.Since(start); d > c.within {
					t.Errorf("registered after %v", d)
				}
			})
		})
	}
}

// The client is asked to stop: that says nothing of the leader.
func TestCancelKeepsTheLeader(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		follower := newFakeStore(stateOf(t, "S"))
		follower.fail(&store.NotLeaderError{Node: "amy"})
		w.serve("alice", follower, APIOptions{})
		w.add("amy", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		client := w.client(testpki.Server("dc2", "bob"), false)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := client.Register(ctx, *bob()); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if known := client.leader.Load(); known == nil || *known != "https://amy.server.dc1.consul" {
			t.Errorf("the leader is %v", known)
		}
	})
}

func TestRedirectsEnd(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.add("alice", elsewhere("https://amy.server.dc1.consul"))
		w.add("amy", elsewhere("https://alice.server.dc1.consul"))
		client := w.client(testpki.Server("dc2", "bob"), false)
		_, err := client.Register(t.Context(), *bob())
		if err == nil || !strings.Contains(err.Error(), "do not agree on a leader") || client.leader.Load() != nil {
			t.Error(err)
		}
		if got := strings.Fields(w.dialled()); len(got) != maxRedirects {
			t.Errorf("dialled %v", got)
		}
		w.change("amy", func(x *host) { x.down = true }) // and one that all name, and that is gone
		w.cut("amy")
		if _, err = client.Register(t.Context(), *bob()); err == nil || !strings.Contains(err.Error(), "reach the leader of the store: ") {
			t.Error(err)
		}
	})
}

// Many goroutines follow a leader that changes.
func TestManyFollow(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		to := []string{"https://amy.server.dc1.consul", "https://art.server.dc1.consul"}
		w.add("alice", elsewhere(to[0], to[1], to[0], to[1]))
		for _, node := range []string{"amy", "art"} {
			w.serve(node, newFakeStore(stateOf(t, "S")), APIOptions{})
		}
		w.change("art", func(x *host) { x.down = true })
		client := w.client(testpki.Server("dc2", "bob"), false)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { _, _ = client.Register(t.Context(), *bob()) }) // for the race detector
		}
		wg.Wait()
	})
}

// answers serves one answer to whatever is asked.
func answers(code int, header http.Header, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

func TestAnswerError(t *testing.T) {
	for _, c := range []struct {
		code            int
		body            string
		message, reason string
	}{
		{409, `{"error": "it is alice's", "reason": "name"}`, "it is alice's", "name"},
		{500, `oh no`, "the primary answered 500 Internal Server Error", ""},
		{200 + 4, ``, "the primary answered 204 No Content", ""},
		{302, ``, "the primary answered 302 Found", ""},
		{304, ``, "the primary answered 304 Not Modified", ""},
		{400, `{"error": "` + strings.Repeat("x", 100000) + `"}`, strings.Repeat("x", maxMessage) + "...", ""},
	} {
		bubble(t, func(t *testing.T, w *world) {
			w.add("alice", answers(c.code, nil, c.body))
			_, err := w.client(testpki.Server("dc2", "bob"), false).Register(t.Context(), *bob())
			answer, ok := errors.AsType[*AnswerError](err)
			if !ok || answer.Code != c.code || answer.Reason != c.reason || err.Error() != c.message {
				t.Errorf("%d %.40s: %v", c.code, c.body, err)
			}
		})
	}
}

// What is no answer of ours is an error, and no lease, greeting or promise.
func TestGarbage(t *testing.T) {
	at := server("dc1", "amy", "127.77.1.2")
	calls := map[string]func(c *Client) error{
		"register": func(c *Client) error { _, err := c.Register(context.Background(), *at); return err },
		"greet":    func(c *Client) error { _, err := c.Greet(context.Background(), "alice.lan:8443"); return err },
		"promise":  func(c *Client) error { return c.Promise(context.Background(), "alice.lan:8443", store.Proposal{}) },
		"read":     func(c *Client) error { return readFirst(context.Background(), c) },
	}
	for _, bad := range []struct {
		name string
		h    http.HandlerFunc
		not  string // the calls that it is good enough for
	}{
		{"no JSON", answers(200, nil, "<html>"), "promise"},
		{"half of it", answers(200, nil, `{"index": 1, "ttl": "30s"`), "promise"},
		{"other types", answers(200, nil, `{"index": "1", "ttl": 30, "node": 1}`), "promise"},
		{"a redirect", answers(307, nil, `{}`), ""},
		{"another redirect", answers(301, http.Header{"Location": {"https://amy.server.dc1.consul/"}}, `{}`), ""},
		{"not modified", answers(304, nil, ""), ""},
		{"no stream", answers(200, http.Header{"Content-Type": {"application/json"}}, "{}\n"), "promise greet"},
		{"a stream", answers(200, http.Header{"Content-Type": {streamType}}, "[]\n"), "promise"},
		{"a stream without an end", answers(200, http.Header{"Content-Type": {streamType}}, "{}"), "promise greet"},
		{"a stream of nothing", answers(200, http.Header{"Content-Type": {streamType}}, ""), "promise"},
		{"an end amid", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"index": 1}`)
			panic(http.ErrAbortHandler)
		}, ""},
	} {
		t.Run(bad.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.add("alice", bad.h)
				c := w.client(testpki.Server("dc1", "amy"), true)
				for name, call := range calls {
					if err := call(c); (err == nil) != slices.Contains(strings.Fields(bad.not), name) {
						t.Errorf("%s: %v", name, err)
					}
				}
			})
		})
	}
}

// tooMuch answers with more than is read.
type tooMuch struct{ left int }

func (m *tooMuch) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {streamType}}, Body: io.NopCloser(m), Request: r}, nil
}

func (m *tooMuch) Read(p []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), m.left)
	m.left -= n
	return n, nil
}

func TestAnswersAreBounded(t *testing.T) {
	for what, ask := range map[string]func(c *Client) error{
		"a stream":  func(c *Client) error { return readFirst(t.Context(), c) },
		"an answer": func(c *Client) error { return c.RemovePeer(t.Context(), "x") },
	} {
		m := &tooMuch{left: 2 * maxAnswer}
		err := ask(NewClient(ClientOptions{Primary: "dc1", Domain: "consul", Transport: m}))
		if err == nil || !strings.Contains(err.Error(), "more than 67108864 bytes") || m.left < maxAnswer/2 {
			t.Errorf("%s: %v, with %d bytes left", what, err, m.left)
		}
	}
}

// readFirst asks for a stream, and gives it up after its first message.
func readFirst(ctx context.Context, c *Client) error {
	f, err := c.stream(ctx, state.New(), time.Minute)
	if err != nil {
		return err
	}
	defer f.close()
	_, err = f.next()
	return err
}

func TestGreetAndPromise(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		fake := newFakeStore(state.New())
		w.serve("alice", fake, APIOptions{})
		c := w.client(testpki.Server("dc1", "amy"), true)
		if g, err := c.Greet(t.Context(), "alice.lan:8443"); err != nil || g.Node != "alice" || g.Expect != 3 {
			t.Errorf("%+v, %v", g, err)
		}
		if err := c.Promise(t.Context(), "alice.lan:8443", store.Proposal{Members: make([]store.Member, 3)}); err != nil || fake.asked() != "promise to 3" {
			t.Error(err)
		}
		w.change("alice", func(x *host) { x.silent = true })
		w.cut("alice")
		synctest.Wait()
		start := time.Now()
		if _, err := c.Greet(t.Context(), "alice.lan:8443"); err == nil || time.Since(start) != requestTimeout {
			t.Errorf("from who says nothing: %v after %v", err, time.Since(start))
		}
	})
}

// Names are put into paths as they are, whatever characters they have.
func TestPathOf(t *testing.T) {
	var got string
	bubble(t, func(t *testing.T, w *world) {
		w.add("alice", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			got = r.URL.EscapedPath()
			_ = json.NewEncoder(w).Encode(Lease{TTL: "30s"})
		}))
		c := w.client(testpki.Server("dc1", "amy"), false)
		_ = c.Remove(t.Context(), state.Key{Datacenter: "dc1", Kind: state.KindGateway, Name: "a/../b?c"})
		if got != "/v1/federation-state/dc1/gateways/a%2F..%2Fb%3Fc" {
			t.Errorf("asked for %s", got)
		}
		_ = c.RemovePeer(t.Context(), "a/b")
		if got != "/v1/federation-peers/a%2Fb" {
			t.Errorf("asked for %s", got)
		}
		c.Close()
		synctest.Wait()
	})
}
