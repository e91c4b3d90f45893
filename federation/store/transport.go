package store

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// A raft address is "node@host:port", so that who dials knows whose
// certificate to expect.
func raftAddress(node, address string) raft.ServerAddress {
	return raft.ServerAddress(node + "@" + address)
}

func splitAddress(a raft.ServerAddress) (node, address string) {
	node, address, _ = strings.Cut(string(a), "@")
	return node, address
}

// Addr is a raft address as a net.Addr.
type layerAddr raft.ServerAddress

func (layerAddr) Network() string  { return "raft" }
func (a layerAddr) String() string { return string(a) }

// A layer carries raft's connections. It knows all of them, so that it can cut
// them off at once.
type layer struct {
	self   raft.ServerAddress
	dial   func(ctx context.Context, node, address string) (net.Conn, error)
	accept chan net.Conn

	ctx  context.Context // ends when the layer is cut
	stop context.CancelFunc
	over chan struct{} // closed by Close

	mu    sync.Mutex
	conns map[*layerConn]struct{} // nil when cut
	close sync.Once
}

var _ raft.StreamLayer = (*layer)(nil)

func newLayer(self raft.ServerAddress, dial func(ctx context.Context, node, address string) (net.Conn, error)) *layer {
	l := &layer{
		self: self, dial: dial,
		accept: make(chan net.Conn), over: make(chan struct{}),
		conns: make(map[*layerConn]struct{}),
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// A layerConn takes itself out of its layer when it is closed.
type layerConn struct {
	net.Conn
	layer *layer
	once  sync.Once
	err   error
	gone  chan struct{}
}

// Close implements [net.Conn].
func (c *layerConn) Close() error {
	c.once.Do(func() {
		c.layer.mu.Lock()
		delete(c.layer.conns, c)
		c.layer.mu.Unlock()
		c.err = c.Conn.Close()
		close(c.gone)
	})
	return c.err
}

// maxConns is how many connections there may be: siblings have a handful each.
const maxConns = 256

// add returns nil, and has closed c, when the layer is cut or full.
func (l *layer) add(c net.Conn) *layerConn {
	lc := &layerConn{Conn: c, layer: l, gone: make(chan struct{})}
	l.mu.Lock()
	up := l.conns != nil && len(l.conns) < maxConns
	if up {
		l.conns[lc] = struct{}{}
	}
	l.mu.Unlock()
	if !up {
		_ = c.Close()
		return nil
	}
	return lc
}

// cut closes every connection, and lets no new ones be.
func (l *layer) cut() {
	l.stop()
	l.mu.Lock()
	conns := l.conns
	l.conns = nil
	l.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
}

// serve hands a connection to raft and returns when it is closed.
func (l *layer) serve(ctx context.Context, c net.Conn) {
	lc := l.add(c)
	if lc == nil {
		return
	}
	defer func() { _ = lc.Close() }()
	select {
	case l.accept <- lc:
	case <-l.ctx.Done():
		return
	case <-ctx.Done():
		return
	}
	select {
	case <-lc.gone:
	case <-ctx.Done():
	}
}

// Accept implements [net.Listener].
func (l *layer) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.over:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *layer) Close() error {
	l.cut()
	l.close.Do(func() { close(l.over) })
	return nil
}

// Addr implements [net.Listener].
func (l *layer) Addr() net.Addr { return layerAddr(l.self) }

// Dial implements [raft.StreamLayer].
func (l *layer) Dial(a raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	node, address := splitAddress(a)
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	c, err := l.dial(ctx, node, address)
	if err != nil {
		return nil, fmt.Errorf("dial %s at %s: %w", node, address, err)
	}
	if lc := l.add(c); lc != nil {
		return lc, nil
	}
	return nil, net.ErrClosed
}

// A transport remembers what this node, while it leads, hears of the others.
type transport struct {
	*raft.NetworkTransport

	mu    sync.Mutex
	heard map[raft.ServerID]contact
}

type contact struct {
	at   time.Time
	last uint64 // entry that it has
}

// AppendEntries implements [raft.Transport]. Heartbeats come by here as well.
// There is no pipeline, which would go past it: it gains nothing in a LAN, see
// hashicorp/raft#541.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := t.NetworkTransport.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.heard[id] = contact{time.Now(), resp.LastLog}
	return nil
}

func (t *transport) contact(id raft.ServerID) contact {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.heard[id]
}

// ioTimeout is how long one exchange with a sibling may take; a snapshot may
// take that for each 256 KiB.
const ioTimeout = 5 * time.Second

func newTransport(l *layer, addresses raft.ServerAddressProvider, log *hcLog) *transport {
	return &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			ServerAddressProvider: addresses,
			Logger:                log,
			Stream:                l,
			MaxPool:               3,
			MaxRPCsInFlight:       1,
			Timeout:               ioTimeout,
		}),
		heard: make(map[raft.ServerID]contact),
	}
}
