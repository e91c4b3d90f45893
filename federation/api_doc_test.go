package federation_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"culvert/certs"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/federation/store"
)

const apiPage = "../docs/api.md"

// TestAPIPage plays the example of docs/api.md: each request goes to the API over a
// real store in memory, as whom it says, and what comes back is held against the
// page. What differs from one store to the next is taken as the page says under
// "A worked example": an index, a name of a store and an ETag stand for the ones
// that come in their place, and go on to do so; a time stands for any time.
func TestAPIPage(t *testing.T) {
	page, err := os.ReadFile(apiPage)
	if err != nil {
		t.Fatal(err)
	}
	steps, err := readExample(string(page))
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) < 20 {
		t.Fatalf("the example has %d steps", len(steps))
	}
	full := fullStore(t)
	synctest.Test(t, func(t *testing.T) {
		s, err := store.Open(store.Options{Datacenter: "dc1", Node: "alice", Address: "10.71.0.11:8443", Expect: 1})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(5 * time.Second) // it elects itself
		p := &player{names: newStandIns(), scenes: map[string]http.Handler{
			"":                             exampleAPI(s),
			"a follower":                   exampleAPI(refusing{s, &store.NotLeaderError{Node: "amy", Address: "10.71.0.12:8443"}}),
			"before there is a leader":     exampleAPI(refusing{s, &store.NotLeaderError{}}),
			"a leader whose disk is full":  exampleAPI(refusing{s, &store.DiskError{Path: "/var/lib/culvert/raft", Err: syscall.ENOSPC}}),
			"a store that takes no more":   exampleAPI(refusing{s, full}),
			"a sidecar's admin address":    federation.ReadHandler(s, zap.NewNop()),
			"a process that knows nothing": federation.ReadHandler(fixedSource{state.New()}, zap.NewNop()),
		}}
		for _, step := range steps {
			if err := p.play(step); err != nil {
				t.Errorf("%s:%d: %v", apiPage, step.line, err)
			}
		}
		for scene := range p.scenes {
			if !p.played[scene] {
				t.Errorf("nothing of the page asks %q", scene)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// exampleAPI is the API of dc1. Who asks, a test says.
func exampleAPI(s federation.Store) http.Handler {
	return federation.NewAPI(s, federation.APIOptions{
		Datacenter: "dc1", Domain: "consul",
		Identity: func(cs tls.ConnectionState) (certs.Identity, error) { return certs.ParseName(cs.ServerName, "consul") },
	})
}

// A refusing store takes no writes.
type refusing struct {
	federation.Store
	err error
}

func (r refusing) Register(context.Context, state.Registration) (store.Lease, error) {
	return store.Lease{}, r.err
}

type fixedSource struct{ state *state.State }

func (f fixedSource) State() *state.State      { return f.state }
func (f fixedSource) Changed() <-chan struct{} { return nil }

// fullStore returns what a state says to one server too many.
func fullStore(t *testing.T) error {
	t.Helper()
	s, at := state.New(), time.Date(2026, 11, 22, 22, 0, 0, 0, time.UTC)
	for i := range state.MaxServers + 1 {
		address := fmt.Sprintf("127.77.%d.%d", 100+i/200, 1+i%200)
		reg := &state.Registration{Datacenter: "dc2", Server: &state.Server{
			Node: fmt.Sprintf("s%d", i), Address: "10.72.0.11:8443", Health: state.Passing, Process: state.Process{Start: "a"},
			Services: []state.Service{{Name: "rpc", Kind: "stream", Port: 8300}},
		}}
		if err := reg.Server.Advertise.UnmarshalText([]byte(address)); err != nil {
			t.Fatal(err)
		}
		next, err := s.Apply(uint64(i+1), state.Command{Register: reg, At: at})
		if i == state.MaxServers {
			if !errors.Is(err, state.ErrFull) {
				t.Fatalf("server %d is taken: %v", i+1, err)
			}
			return err
		}
		if err != nil {
			t.Fatal(err)
		}
		s = next
	}
	return nil
}

// An exchange is one step of the example: some time, or a request and its answer.
type exchange struct {
	line   int
	pass   time.Duration
	who    string // a name of a certificate
	scene  string
	method string
	path   string
	header http.Header
	body   string

	status     string
	wantHeader http.Header
	wantBody   string
	hasAnswer  bool
}

var (
	passes = regexp.MustCompile(`^\*([0-9]+) seconds pass\b`)
	asks   = regexp.MustCompile(`^# (server|gateway) ([a-z0-9]+)/([a-z0-9]+) asks(?: (.*))?$`)
)

// readExample returns the steps of a page, in order.
func readExample(page string) ([]exchange, error) {
	var out []exchange
	lines := strings.Split(page, "\n")
	for i := 0; i < len(lines); i++ {
		if m := passes.FindStringSubmatch(lines[i]); m != nil {
			n, err := strconv.Atoi(m[1])
			if err != nil {
				return nil, err
			}
			out = append(out, exchange{line: i + 1, pass: time.Duration(n) * time.Second})
			continue
		}
		if lines[i] != "```http request" && lines[i] != "```http answer" {
			continue
		}
		end := slices.Index(lines[i:], "```") + i
		if end < i {
			return nil, fmt.Errorf("line %d: the block has no end", i+1)
		}
		block := lines[i+1 : end]
		var err error
		if lines[i] == "```http request" {
			var e exchange
			e, err = readRequest(block)
			e.line = i + 1
			out = append(out, e)
		} else {
			err = readAnswer(out, block)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
		i = end
	}
	for _, e := range out {
		if e.pass == 0 && !e.hasAnswer {
			return nil, fmt.Errorf("line %d: the request has no answer", e.line)
		}
	}
	return out, nil
}

func readRequest(block []string) (exchange, error) {
	if len(block) < 2 {
		return exchange{}, errors.New("a request has two lines at least")
	}
	m := asks.FindStringSubmatch(block[0])
	method, path, ok := strings.Cut(block[1], " ")
	if m == nil || !ok {
		return exchange{}, fmt.Errorf("%q and %q do not tell who asks for what", block[0], block[1])
	}
	e := exchange{who: m[3] + "." + m[1] + "." + m[2] + ".consul", scene: m[4], method: method, path: path}
	e.header, e.body = readRest(block[2:])
	return e, nil
}

func readAnswer(steps []exchange, block []string) error {
	if len(steps) == 0 || steps[len(steps)-1].pass > 0 || steps[len(steps)-1].hasAnswer || len(block) == 0 {
		return errors.New("an answer without a request")
	}
	e := &steps[len(steps)-1]
	e.hasAnswer, e.status = true, block[0]
	e.wantHeader, e.wantBody = readRest(block[1:])
	return nil
}

// readRest reads headers, and after an empty line a body.
func readRest(lines []string) (http.Header, string) {
	header := make(http.Header)
	for i, line := range lines {
		name, value, ok := strings.Cut(line, ": ")
		if !ok {
			return header, strings.TrimSpace(strings.Join(lines[i:], "\n"))
		}
		header.Set(name, value)
	}
	return header, ""
}

// told are the headers that the page has to tell whenever they are there.
var told = []string{
	"Etag", "Location", "Retry-After", federation.IndexHeader, federation.StoreHeader, federation.FullHeader, federation.LeaderHeader,
}

// A player sends the page's requests.
type player struct {
	names  *standIns
	scenes map[string]http.Handler
	played map[string]bool
}

func (p *player) play(e exchange) error {
	if e.pass > 0 {
		time.Sleep(e.pass)
		return nil
	}
	h := p.scenes[e.scene]
	if h == nil {
		return fmt.Errorf("nobody is %q", e.scene)
	}
	if p.played == nil {
		p.played = make(map[string]bool)
	}
	p.played[e.scene] = true
	r := httptest.NewRequestWithContext(context.Background(), e.method, p.names.inPath(e.path), strings.NewReader(e.body))
	for name, values := range e.header {
		r.Header[name] = []string{p.names.real("etag", values[0])}
	}
	r.TLS = &tls.ConnectionState{ServerName: e.who}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if err := p.compare(&e, w); err != nil {
		return fmt.Errorf("%s %s: %w\nThe answer was\n\n%s", e.method, e.path, err, written(w))
	}
	return nil
}

func (p *player) compare(e *exchange, w *httptest.ResponseRecorder) error {
	if got := status(w); got != e.status {
		return fmt.Errorf("the page says %q", e.status)
	}
	kind := "application/json"
	if strings.Contains(e.path, "&stream") {
		kind = "application/x-ndjson"
	}
	if w.Body.Len() > 0 && (w.Header().Get("Content-Type") != kind || w.Header().Get("Cache-Control") != "no-store") {
		return errors.New("Content-Type and Cache-Control are not those of every answer")
	}
	for _, name := range told {
		got, want := w.Header().Get(name), e.wantHeader.Get(name)
		kind := map[string]string{"Etag": "etag", federation.IndexHeader: "index", federation.StoreHeader: "store"}[name]
		if kind != "" && got != "" && want != "" {
			if err := p.names.match(kind, want, got); err != nil {
				return err
			}
			continue
		}
		if got != want {
			return fmt.Errorf("%s is %q, and the page says %q", name, got, want)
		}
	}
	for name := range e.wantHeader {
		if !slices.Contains(told, name) {
			return fmt.Errorf("the page tells of %s, which is not looked at", name)
		}
	}
	if e.wantBody == "" || w.Body.Len() == 0 {
		if e.wantBody != strings.TrimSpace(w.Body.String()) {
			return errors.New("one of the two has no body")
		}
		return nil
	}
	want, err := decode([]byte(e.wantBody))
	if err != nil {
		return fmt.Errorf("the page's body: %w", err)
	}
	got, err := decode(w.Body.Bytes())
	if err != nil {
		return err
	}
	return p.names.same("", want, got)
}

func decode(b []byte) (any, error) {
	var v any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	err := d.Decode(&v)
	return v, err
}

func status(w *httptest.ResponseRecorder) string {
	return fmt.Sprintf("%d %s", w.Code, http.StatusText(w.Code))
}

// written is an answer as the page has it.
func written(w *httptest.ResponseRecorder) string {
	var b strings.Builder
	fmt.Fprintln(&b, status(w))
	for _, name := range told {
		if v := w.Header().Get(name); v != "" {
			fmt.Fprintf(&b, "%s: %s\n", name, v)
		}
	}
	if w.Body.Len() > 0 {
		fmt.Fprintf(&b, "\n%s", w.Body)
	}
	return b.String()
}

// standIns are what stands on the page for what is not the same in two stores.
type standIns struct{ page, store map[string]string } // of kind and value

func newStandIns() *standIns { return &standIns{make(map[string]string), make(map[string]string)} }

// match binds a value of the page to one of the store, for good. Indices keep
// their order.
func (n *standIns) match(kind, page, now string) error {
	if known, ok := n.page[kind+" "+page]; ok && known != now {
		return fmt.Errorf("%s %s stands for %s on the page, and is %s now", kind, page, known, now)
	}
	if known, ok := n.store[kind+" "+now]; ok && known != page {
		return fmt.Errorf("%s %s is %s on the page, and now the page has %s", kind, now, known, page)
	}
	if kind == "index" {
		for other, value := range n.page {
			o, isIndex := strings.CutPrefix(other, "index ")
			if isIndex && (number(o) < number(page)) != (number(value) < number(now)) {
				return fmt.Errorf("indices %s and %s are not in the order of %s and %s", o, page, value, now)
			}
		}
	}
	n.page[kind+" "+page], n.store[kind+" "+now] = now, page
	return nil
}

func number(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64) // what is none is 0, and differs elsewhere
	return n
}

// real is what a value of the page stands for; itself if for nothing.
func (n *standIns) real(kind, page string) string {
	if v, ok := n.page[kind+" "+page]; ok {
		return v
	}
	return page
}

var inQuery = regexp.MustCompile(`\b(index|store)=([^&]+)`)

func (n *standIns) inPath(path string) string {
	return inQuery.ReplaceAllStringFunc(path, func(s string) string {
		kind, value, _ := strings.Cut(s, "=")
		return kind + "=" + n.real(kind, value)
	})
}

// same compares a value of the page with one of an answer.
func (n *standIns) same(key string, page, got any) error {
	switch want := page.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok || !slices.Equal(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(g))) {
			return fmt.Errorf("%s has other keys than %v", key, slices.Sorted(maps.Keys(want)))
		}
		for _, k := range slices.Sorted(maps.Keys(want)) {
			if err := n.same(k, want[k], g[k]); err != nil {
				return err
			}
		}
		return nil
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(want) {
			return fmt.Errorf("%s is not of %d", key, len(want))
		}
		for i := range want {
			if err := n.same(key, want[i], g[i]); err != nil {
				return err
			}
		}
		return nil
	}
	p, g := fmt.Sprint(page), fmt.Sprint(got)
	switch key {
	case "index", "store":
		return n.match(key, p, g)
	case "since", "updated_at", "heard":
		_, err := time.Parse(time.RFC3339, p)
		_, err2 := time.Parse(time.RFC3339, g)
		return errors.Join(err, err2)
	}
	if page != got {
		return fmt.Errorf("%s is %v, and the page says %v", key, got, page)
	}
	return nil
}
