package h2

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"

	"culvert/certs"
	"culvert/internal/memnet"
	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	host    = "alice.server.dc1.consul"
	address = "https://" + host + "/x"
)

func load(t *testing.T, ca *testpki.CA, who testpki.Option) *certs.Source {
	t.Helper()
	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), ca.Leaf(t, who))
	s, err := certs.Load(certs.Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A site is a server, a client, and what was dialled between the two.
type site struct {
	handler   http.HandlerFunc
	server    *Server
	serverTLS *tls.Config
	clientTLS *tls.Config
	creds     *certs.Source // the server's
	client    *http.Client
	fail      atomic.Pointer[error] // what a dial comes to instead
	wait      atomic.Pointer[chan struct{}]

	// The contexts of connections end with stop.
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup // ServeConn

	mu     sync.Mutex
	dialed []*end
	taken  []*end
}

// An end is one end of a connection, whose path may swallow what is written.
type end struct {
	*memnet.Conn
	lost atomic.Bool
}

func (e *end) Write(p []byte) (int, error) {
	if e.lost.Load() {
		return len(p), nil
	}
	return e.Conn.Write(p)
}

// bubble runs f with a site inside a synctest bubble. Requests are answered with
// hello, unless f sets another handler: one with channels must have them from
// within the bubble.
func bubble(t *testing.T, o ServerOptions, f func(t *testing.T, s *site)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ca := testpki.New(t, "consul")
		s := &site{handler: hello, creds: load(t, ca, testpki.Server("dc1", "alice"))}
		s.server = NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.handler(w, r) }), o)
		s.serverTLS = s.creds.ServerConfig([]string{protocol, "other"}, func(string) (certs.Admission, error) {
			return certs.Admission{Roles: []certs.Role{certs.RoleServer, certs.RoleGateway}}, nil
		})
		s.clientTLS = load(t, ca, testpki.Gateway("dc2", "gw1")).ClientConfig(host, []string{protocol})
		s.ctx, s.stop = context.WithCancel(context.Background())
		transport := NewTransport(s.dial, TransportOptions{})
		s.client = &http.Client{Transport: transport}
		f(t, s)
		s.stop()
		s.wg.Wait()
		transport.CloseIdleConnections()
	})
}

func (s *site) dial(ctx context.Context, to string) (*tls.Conn, error) {
	if to != host+":443" {
		return nil, errors.New("asked for " + to)
	}
	if ch := s.wait.Load(); ch != nil {
		select {
		case <-*ch:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if err := s.fail.Load(); err != nil {
		return nil, *err
	}
	a, b := memnet.Pipe()
	near, far := &end{Conn: a}, &end{Conn: b}
	s.mu.Lock()
	s.dialed, s.taken = append(s.dialed, near), append(s.taken, far)
	s.mu.Unlock()
	s.wg.Go(func() {
		c := tls.Server(far, s.serverTLS)
		if c.Handshake() != nil {
			_ = far.Close()
			return
		}
		s.server.ServeConn(s.ctx, c)
	})
	c := tls.Client(near, s.clientTLS)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = near.Close()
		return nil, err
	}
	return c, nil
}

func (s *site) wantDials(t *testing.T, n int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.dialed) != n {
		t.Errorf("%d dials, want %d", len(s.dialed), n)
	}
}

// last returns both ends of the connection that was dialled last.
func (s *site) last() (near, far *end) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dialed[len(s.dialed)-1], s.taken[len(s.taken)-1]
}

func (s *site) get(ctx context.Context) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(body), err
}

func (s *site) want(t *testing.T, want string) {
	t.Helper()
	if got, err := s.get(t.Context()); got != want || err != nil {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// An answer is what became of a request.
type answer struct {
	body string
	err  error
}

// ask makes n requests at once.
func (s *site) ask(ctx context.Context, n int) <-chan answer {
	answers := make(chan answer, n)
	for range n {
		go func() {
			body, err := s.get(ctx)
			answers <- answer{body, err}
		}()
	}
	return answers
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

// until returns a handler that answers when the request's context ends, or when
// release is closed.
func until(release <-chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
			_, _ = io.WriteString(w, "released")
		case <-r.Context().Done():
			_, _ = io.WriteString(w, "stopped")
		}
	}
}
