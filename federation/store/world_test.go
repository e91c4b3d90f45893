package store

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"culvert/federation/state"
	"culvert/internal/memnet"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" { // a benchmark is of calls that nobody looks at
		runtime.GOMAXPROCS(max(16, runtime.NumCPU())) // so that none waits for one whose call is looked at
		theTap, errTap = newTap()                     // before there is a bubble, which would have its goroutines
	}
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("culvert/federation/store.(*tap).listen"))
}

// A world is a LAN in memory with servers on it, whose disks are real.
type world struct {
	t     *testing.T
	mu    sync.Mutex
	nodes map[string]*node // by address
	apart map[string]bool  // nodes that nobody reaches
}

// A node is a server that is started, killed and started again with one data
// folder.
type node struct {
	w      *world
	o      Options
	disk   *testDisk
	store  *Store
	cancel context.CancelFunc
	done   sync.WaitGroup
	up     bool
}

func newWorld(t *testing.T) *world {
	return &world{t: t, nodes: make(map[string]*node), apart: make(map[string]bool)}
}

// dataDir is in memory where it can be: the tests make some ten thousand
// syncs, and what a crash loses is up to testDisk.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "culvert-store-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func address(name string) string { return name + ".lan:8443" }

// add makes a server that is not started. All of them name each other in
// retry_join.
func (w *world) add(name string, expect int) *node {
	dir := dataDir(w.t)
	n := &node{w: w, disk: newDisk(dir), o: Options{
		Datacenter: "dc1", Node: name, Address: address(name), DataDir: dir, Expect: expect,
		Neighbours: neighbours{w, name}, Log: w.logger(name),
		Dial: func(ctx context.Context, node, to string) (net.Conn, error) { return w.dial(ctx, name, node, to) },
	}}
	n.o.Join = func() []string {
		w.mu.Lock()
		defer w.mu.Unlock()
		var all []string
		for a := range w.nodes {
			all = append(all, a)
		}
		return all
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[n.o.Address] = n
	return n
}

func (w *world) logger(name string) *zap.Logger {
	if os.Getenv("STORE_LOG") == "" {
		return zap.NewNop()
	}
	return zaptest.NewLogger(w.t).Named(name)
}

// three are servers that begin together, and are started.
func (w *world) three() []*node {
	ns := []*node{w.add("alice", 3), w.add("amy", 3), w.add("art", 3)}
	for _, n := range ns {
		n.start()
	}
	return ns
}

func (n *node) start() {
	n.w.t.Helper()
	n.disk.powerOn()
	s, err := Open(n.o)
	if err != nil {
		n.w.t.Fatalf("open %s: %v", n.o.Node, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.w.mu.Lock()
	n.store, n.cancel, n.up = s, cancel, true
	n.w.mu.Unlock()
	n.done.Go(func() { _ = s.Run(ctx) })
}

// running is for goroutines beside the test's.
func (n *node) running() *Store {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.store
}

// stop ends a server in good order.
func (n *node) stop() {
	n.cancel()
	n.done.Wait()
	n.w.mu.Lock()
	n.up = false
	n.w.mu.Unlock()
}

// kill ends a server as a power cut does: nothing leaves it any more, and what
// was not synced is lost.
func (n *node) kill() {
	n.w.mu.Lock()
	n.up = false
	n.w.mu.Unlock()
	n.disk.powerOff()
	if e := n.store.current(); e != nil {
		e.layer.cut()
	}
	n.cancel()
	n.done.Wait()
}

func (w *world) stopAll() {
	for _, n := range w.nodes {
		if n.cancel != nil {
			n.stop()
		}
	}
}

var errUnreachable = errors.New("no route to host")

// at finds a server that is up and not apart.
func (w *world) at(from, address string) (*node, *Store, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.nodes[address]
	if n == nil || !n.up || (w.apart[from] || w.apart[n.o.Node]) && from != n.o.Node {
		return nil, nil, errUnreachable
	}
	return n, n.store, nil
}

func (w *world) dial(_ context.Context, from, node, address string) (net.Conn, error) {
	n, s, err := w.at(from, address)
	if err != nil {
		return nil, err
	}
	if n.o.Node != node {
		return nil, fmt.Errorf("%s has the certificate of %s, want %s", address, n.o.Node, node)
	}
	a, b := memnet.Pipe()
	n.done.Go(func() { s.ServeConn(context.Background(), b) })
	return a, nil
}

// part takes a server off the LAN, or puts it back.
func (w *world) part(n *node, apart bool) {
	w.mu.Lock()
	w.apart[n.o.Node] = apart
	w.mu.Unlock()
	for _, n := range w.nodes {
		if e := n.store.current(); e != nil {
			e.layer.reset()
		}
	}
}

// reset closes the connections that there are.
func (l *layer) reset() {
	l.mu.Lock()
	var all []*layerConn
	for c := range l.conns {
		all = append(all, c)
	}
	l.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
}

type neighbours struct {
	w    *world
	from string
}

func (n neighbours) Greet(_ context.Context, address string) (Greeting, error) {
	_, to, err := n.w.at(n.from, address)
	if err != nil {
		return Greeting{}, err
	}
	return to.Greeting(), nil
}

func (n neighbours) Promise(_ context.Context, address string, p Proposal) error {
	_, to, err := n.w.at(n.from, address)
	if err != nil {
		return err
	}
	return to.Promise(p)
}

// bubble runs a test on a clock of its own.
func bubble(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stopAll()
		f(t, w)
	})
}

// sleep lets time pass in a bubble.
func sleep(d time.Duration) { time.Sleep(d) }

// eventually waits on the bubble's clock.
func eventually(t *testing.T, within time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		if f() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// leader waits for one of them to lead.
func leader(t *testing.T, ns ...*node) *node {
	t.Helper()
	var found *node
	eventually(t, 30*time.Second, "a leader", func() bool {
		for _, n := range ns {
			if _, _, err := n.store.leading(); err == nil {
				found = n
				return true
			}
		}
		return false
	})
	return found
}

func server(dc, node, advertise string) state.Registration {
	return state.Registration{Datacenter: dc, Server: &state.Server{
		Node: node, Advertise: netip.MustParseAddr(advertise), Address: address(node), Version: "0.1.0",
		Services: []state.Service{{Name: "gossip-packet", Kind: "packet", Port: 8302}},
		Process:  state.Process{Start: node + "-1"},
	}}
}

// numbered are servers of other datacenters, with an address of their own each.
func numbered(i int) state.Registration {
	return server(fmt.Sprintf("dc%d", 2+i%50), fmt.Sprintf("n%d", i), netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}).String())
}

// register repeats a registration at whoever leads, as its owner does, until it
// is acknowledged.
func register(t *testing.T, reg state.Registration, ns ...*node) Lease {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for _, n := range ns {
			lease, err := n.store.Register(t.Context(), reg)
			if err == nil {
				return lease
			}
			if _, ok := errors.AsType[*state.ConflictError](err); ok {
				t.Fatal(err)
			}
		}
	}
	t.Fatalf("%s is not registered", reg.Key())
	return Lease{}
}

func has(s *state.State, reg state.Registration) bool {
	reg = normal(reg)
	return s.Has(&reg)
}

// keep renews registrations until the test ends. It is what sidecars do.
func keep(t *testing.T, regs []state.Registration, ns ...*node) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, reg := range regs {
				for _, n := range ns {
					if _, err := n.running().Register(ctx, reg); err == nil {
						break
					}
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}
