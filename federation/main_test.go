package federation

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"culvert/certs"
	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/h2"
	"culvert/internal/memnet"
	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const gossipPort = 7946

func gossip() []state.Service {
	return []state.Service{{Name: "gossip-packet", Kind: "packet", Port: gossipPort}}
}

// server is an entry as a sidecar registers it.
func server(dc, node, advertise string) *state.Registration {
	return &state.Registration{Datacenter: dc, Server: &state.Server{
		Node: node, Advertise: netip.MustParseAddr(advertise), Address: "10.71.0.11:8443", Version: "0.1.0",
		Services: gossip(), Health: state.Passing, Process: state.Process{Start: "start-" + node},
	}}
}

// gateway is an entry as a gateway registers it.
func gateway(dc, name, wan string) *state.Registration {
	return &state.Registration{Datacenter: dc, Gateway: &state.Gateway{
		Name: name, Address: "10.71.0.1:8443", WANAddress: wan, Version: "0.1.0", Health: state.Passing, Process: state.Process{Start: "start-" + name},
	}}
}

// apply makes the next state of a command, and fails where that is refused.
func apply(t testing.TB, s *state.State, c state.Command) *state.State {
	t.Helper()
	c.At = time.Now()
	next, err := s.Apply(s.Index()+1, c)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// stateOf is the state of a store after some registrations.
func stateOf(t testing.TB, id string, entries ...*state.Registration) *state.State {
	t.Helper()
	s := apply(t, state.New(), state.Command{Found: id})
	for _, r := range entries {
		s = apply(t, s, state.Command{Register: r})
	}
	return s
}

// removal takes entries away.
func removal(keys ...state.Key) state.Command {
	return state.Command{Remove: &state.Removal{Keys: keys, Left: true}}
}

// fakeStore is a store that says what it is told to.
type fakeStore struct {
	mu       sync.Mutex
	state    *state.State
	changed  chan struct{}
	err      error // of what would change it
	leader   string
	peers    []store.Peer
	did      []string // what was asked of it
	warnings []string
}

func newFakeStore(s *state.State) *fakeStore {
	return &fakeStore{state: s, changed: make(chan struct{}), leader: "alice"}
}

func (f *fakeStore) State() *state.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state
}

func (f *fakeStore) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fakeStore) set(s *state.State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = s
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeStore) do(t testing.TB, c state.Command) { f.set(apply(t, f.State(), c)) }

func (f *fakeStore) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.did = append(f.did, fmt.Sprintf(format, args...))
	return f.err
}

func (f *fakeStore) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// asked returns and forgets what was asked of the store.
func (f *fakeStore) asked() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := strings.Join(f.did, ", ")
	f.did = nil
	return out
}

func (f *fakeStore) Register(_ context.Context, r state.Registration) (store.Lease, error) {
	if err := f.note("register %s", r.Key()); err != nil {
		return store.Lease{}, err
	}
	f.mu.Lock()
	s, warnings := f.state, f.warnings
	f.mu.Unlock()
	next, err := s.Apply(s.Index()+1, state.Command{At: time.Now(), Register: &r})
	if err != nil {
		return store.Lease{}, err
	}
	if next != s {
		f.set(next)
	}
	return store.Lease{Index: next.Index(), TTL: 30 * time.Second, Warnings: warnings}, nil
}

func (f *fakeStore) Remove(_ context.Context, keys []state.Key, left bool) error {
	return f.note("remove %v %v", keys, left)
}

func (f *fakeStore) Leader() (node, address string, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader, "10.71.0.11:8443", f.leader != ""
}

func (f *fakeStore) Peers() []store.Peer { return f.peers }

func (f *fakeStore) RemovePeer(_ context.Context, node string) error {
	return f.note("remove peer %s", node)
}

func (f *fakeStore) Greeting() store.Greeting { return store.Greeting{Node: "alice", Expect: 3} }

func (f *fakeStore) Promise(p store.Proposal) error { return f.note("promise to %d", len(p.Members)) }

// A world is the sidecars of a primary, dc1, and whoever asks them, over TLS and
// HTTP/2 in memory. It is for synctest bubbles.
type world struct {
	t   *testing.T
	ca  *testpki.CA
	ctx context.Context
	wg  sync.WaitGroup

	mu    sync.Mutex
	hosts map[string]*host // by node
	any   string           // the node that answers to the datacenter's name
	dials []string         // the names and addresses that were dialled
	taken map[*memnet.Conn]string
	ends  []func()
}

// A host is one sidecar of the primary.
type host struct {
	config *tls.Config
	server *h2.Server
	creds  *certs.Source
	down   bool // refuses connections
	silent bool // does not answer, nor refuse
}

// bubble runs f with a world in a synctest bubble.
func bubble(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		w := &world{
			t: t, ca: testpki.New(t, "consul"), ctx: ctx, hosts: make(map[string]*host), taken: make(map[*memnet.Conn]string),
		}
		f(t, w)
		cancel()
		for _, end := range w.ends {
			end()
		}
		w.wg.Wait()
	})
}

func (w *world) load(who testpki.Option) *certs.Source {
	w.t.Helper()
	ca, cert, key := w.ca.WriteFiles(w.t, w.t.TempDir(), w.ca.Leaf(w.t, who))
	s, err := certs.Load(certs.Options{CAFile: ca, CertFile: cert, KeyFile: key, Domain: "consul"})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// add makes a sidecar that serves h. The first one answers to the datacenter's
// name.
func (w *world) add(node string, h http.Handler) *host {
	creds := w.load(testpki.Server("dc1", node))
	x := &host{creds: creds, server: h2.NewServer(h, h2.ServerOptions{})}
	x.config = creds.ServerConfig([]string{"h2"}, func(string) (certs.Admission, error) {
		return certs.Admission{Roles: []certs.Role{certs.RoleServer, certs.RoleGateway}}, nil
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hosts[node] = x
	if w.any == "" {
		w.any = node
	}
	return x
}

// serve makes a sidecar with the API over a store.
func (w *world) serve(node string, s Store, o APIOptions) *host {
	o.Datacenter, o.Domain = "dc1", "consul"
	var x *host
	if o.Identity == nil {
		o.Identity = func(cs tls.ConnectionState) (certs.Identity, error) { return x.creds.PeerIdentity(cs) }
	}
	x = w.add(node, NewAPI(s, o))
	return x
}

// change changes a host.
func (w *world) change(node string, f func(x *host)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w.hosts[node])
}

// cut ends the connections of a host.
func (w *world) cut(node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c, to := range w.taken {
		if to == node {
			_ = c.Close()
			delete(w.taken, c)
		}
	}
}

// dialled returns and forgets what was dialled.
func (w *world) dialled() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := strings.Join(w.dials, " ")
	w.dials = nil
	return out
}

// transport returns a way to ask as somebody. Addresses are of the form
// <node>.lan:8443.
func (w *world) transport(who testpki.Option) *http.Transport {
	creds := w.load(who)
	tr := h2.NewTransport(func(ctx context.Context, address string) (*tls.Conn, error) {
		return w.dial(ctx, creds, address)
	}, h2.TransportOptions{})
	w.ends = append(w.ends, tr.CloseIdleConnections)
	return tr
}

func (w *world) dial(ctx context.Context, creds *certs.Source, address string) (*tls.Conn, error) {
	w.mu.Lock()
	w.dials = append(w.dials, address)
	name := strings.TrimSuffix(address, ":443")
	node, isAddress := strings.CutSuffix(address, ".lan:8443")
	if isAddress {
		name = "server.dc1.consul"
	} else if node = strings.TrimSuffix(name, ".server.dc1.consul"); name == "server.dc1.consul" {
		node = w.any
	}
	x := w.hosts[node]
	down, silent := x == nil || x.down, x != nil && x.silent
	w.mu.Unlock()
	switch {
	case down:
		return nil, errors.New("connection refused")
	case silent:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	near, far := memnet.Pipe()
	w.mu.Lock()
	w.taken[far] = node
	w.mu.Unlock()
	w.wg.Go(func() {
		c := tls.Server(far, x.config)
		if c.Handshake() != nil {
			_ = far.Close()
			return
		}
		x.server.ServeConn(w.ctx, c)
	})
	c := tls.Client(near, creds.ClientConfig(name, []string{"h2"}))
	if err := c.HandshakeContext(ctx); err != nil {
		_ = near.Close()
		return nil, err
	}
	return c, nil
}

// client returns a client of the federation that asks as somebody.
func (w *world) client(who testpki.Option, direct bool) *Client {
	return NewClient(ClientOptions{Primary: "dc1", Domain: "consul", Transport: w.transport(who), Direct: direct})
}

// A reply is an answer to a raw request.
type reply struct {
	code   int
	header http.Header
	body   string
}

// failure reads the body of an error.
func (r reply) failure(t *testing.T) failure {
	t.Helper()
	var f failure
	if err := json.Unmarshal([]byte(r.body), &f); err != nil {
		t.Errorf("answer %q: %v", r.body, err)
	}
	return f
}

// ask makes one raw request to whichever sidecar answers.
func ask(t *testing.T, tr http.RoundTripper, method, path, body string, header ...string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, "https://server.dc1.consul"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
		return reply{}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
	}
	return reply{resp.StatusCode, resp.Header, string(b)}
}

// observed is a log and what was written to it.
func observed() (*zap.Logger, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.InfoLevel)
	return zap.New(core), logs
}

// lines returns and forgets what was logged, one message a line.
func lines(logs *observer.ObservedLogs) string {
	var out []string
	for _, e := range logs.TakeAll() {
		out = append(out, e.Message)
	}
	return strings.Join(out, "\n")
}
