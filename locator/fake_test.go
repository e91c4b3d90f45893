package locator

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/internal/resolve"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A way is how an address answers a dial.
type way struct {
	after time.Duration
	err   error // nil connects
}

var (
	answers  = way{}
	refuses  = way{err: syscall.ECONNREFUSED}
	silent   = way{after: 1 << 62}
	cutOff   = way{err: syscall.ENETUNREACH}
	outOfFDs = way{err: syscall.EMFILE}
)

// slowly is an answer after d.
func slowly(d time.Duration) way { return way{after: d} }

// network is where the pools of these tests dial: addresses refuse unless told
// otherwise.
type network struct {
	mu       sync.Mutex
	ways     map[string]way
	dialled  []string
	starts   []time.Time // of the same
	dialling int
	busiest  int // the most that were dialling at a time
	open     int
	written  int // bytes
}

func newNetwork(ways map[string]way) *network { return &network{ways: ways} }

func (n *network) set(address string, w way) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ways[address] = w
}

// took returns the addresses dialled since the last call.
func (n *network) took() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	dialled := n.dialled
	n.dialled, n.starts = nil, nil
	return dialled
}

func (n *network) opened() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.open
}

func (n *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	w, ok := n.ways[address]
	if !ok {
		w = refuses
	}
	n.dialled, n.starts = append(n.dialled, address), append(n.starts, time.Now())
	n.dialling++
	n.busiest = max(n.busiest, n.dialling)
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.dialling--
	}()
	failed := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	if w.after > 0 {
		t := time.NewTimer(w.after)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, failed(ctx.Err())
		}
	}
	if w.err != nil {
		return nil, failed(w.err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open++
	return &conn{n: n, remote: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))}, nil
}

// conn is a connection of a network. Nothing but these methods is called.
type conn struct {
	net.Conn
	n      *network
	remote net.Addr
	once   sync.Once
}

func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) Write(b []byte) (int, error) {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.n.written += len(b)
	return len(b), nil
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.n.mu.Lock()
		defer c.n.mu.Unlock()
		c.n.open--
	})
	return nil
}

// names is a resolver. A name that it does not have takes until ctx ends; a
// service is what it has for "srv:NAME", with ports.
type names struct {
	mu     sync.Mutex
	addrs  map[string][]string
	forgot []string
}

func (r *names) Addresses(ctx context.Context, endpoint string) ([]netip.AddrPort, error) {
	if a := r.Known(endpoint); a != nil {
		return a, nil
	}
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, err
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, err
	}
	<-ctx.Done()
	return nil, fmt.Errorf("resolve %s: %w", host, ctx.Err())
}

func (r *names) Known(endpoint string) []netip.AddrPort {
	host, port, err := net.SplitHostPort(endpoint)
	if resolve.IsService(endpoint) {
		host, port, err = endpoint, "", nil
	}
	r.mu.Lock()
	texts, ok := r.addrs[host]
	r.mu.Unlock()
	if err != nil || !ok {
		return nil
	}
	addrs := []netip.AddrPort{}
	for _, text := range texts {
		if port != "" {
			text = net.JoinHostPort(text, port)
		}
		addrs = append(addrs, netip.MustParseAddrPort(text))
	}
	return addrs
}

func (r *names) Forget(endpoint string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgot = append(r.forgot, endpoint)
}

func (r *names) set(host string, addrs ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.addrs[host] = addrs
}

// newPool returns a pool on a network.
func newPool(n *network, endpoints ...string) *Pool {
	p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}})
	p.Set(Configured(endpoints...))
	return p
}

// dial dials, closes what it got, and tells where it came out and how long it took.
func dial(t *testing.T, p *Pool) (endpoint string, took time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	c, endpoint, err := p.Dial(ctx)
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	took = time.Since(began)
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	return endpoint, took
}

// health describes the endpoints: "a:1 up, b:1 down".
func health(p *Pool) string {
	var out []string
	for _, e := range p.Status() {
		state := " down"
		if e.Healthy {
			state = " up"
		}
		out = append(out, e.Endpoint+state)
	}
	return strings.Join(out, ", ")
}

func wantHealth(t *testing.T, p *Pool, want string) {
	t.Helper()
	if got := health(p); got != want {
		t.Errorf("health: %s; want %s", got, want)
	}
}

func count(all []string, one string) int {
	return len(slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s != one }))
}
