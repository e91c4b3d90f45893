package wanfed

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/hashicorp/consul/agent/consul/wanfed"
	"github.com/hashicorp/consul/agent/pool"
)

// A node is a member of the gossip pool, and what it was told.
type node struct {
	*memberlist.Memberlist
	name, addr string // addr is what its peers are told
	transport  *wanfed.Transport
	server     *server // of a native node

	mu   sync.Mutex
	msgs [][]byte
	left []string // members that it took for dead
}

// NodeMeta and those below make a node a memberlist.Delegate.
func (n *node) NodeMeta(int) []byte { return nil }

// NotifyMsg keeps a message.
func (n *node) NotifyMsg(msg []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.msgs = append(n.msgs, bytes.Clone(msg))
}

// GetBroadcasts has none.
func (n *node) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState has none.
func (n *node) LocalState(bool) []byte { return nil }

// MergeRemoteState takes none.
func (n *node) MergeRemoteState([]byte, bool) {}

// NotifyJoin and those below make a node a memberlist.EventDelegate.
func (n *node) NotifyJoin(*memberlist.Node) {}

// NotifyLeave keeps who was lost.
func (n *node) NotifyLeave(m *memberlist.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.left = append(n.left, m.Name)
}

// NotifyUpdate is of no interest.
func (n *node) NotifyUpdate(*memberlist.Node) {}

func (n *node) messages() [][]byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.msgs)
}

func (n *node) lost() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.left)
}

// member is a node as another one sees it.
func (n *node) member(t *testing.T, name string) *memberlist.Node {
	t.Helper()
	for _, m := range n.Members() {
		if m.Name == name {
			return m
		}
	}
	t.Fatalf("%s does not know %s", n.name, name)
	return nil
}

// config is what both kinds of node have in common: the settings for a WAN, probed
// more often. A probe that is not answered by packets has failed.
func (w *world) config(n *node, dc int, key []byte) *memberlist.Config {
	c := memberlist.DefaultWANConfig()
	c.Name = n.name
	c.BindAddr, c.BindPort = w.addr(dc, 11), gossipPort
	c.AdvertiseAddr, c.AdvertisePort = w.addr(dc, 1), gossipPort
	n.addr = w.at(dc, 1, gossipPort)
	c.ProbeInterval, c.ProbeTimeout = time.Second, 900*time.Millisecond
	c.DisableTcpPings = true
	c.EnableCompression = false // sizes are what they are
	c.SecretKey = key
	c.Delegate, c.Events = n, n
	c.Logger = log.New(io.Discard, "", 0)
	return c
}

func (w *world) create(n *node, c *memberlist.Config) *node {
	w.t.Helper()
	m, err := memberlist.Create(c)
	if err != nil {
		w.t.Fatal(err)
	}
	n.Memberlist = m
	w.t.Cleanup(func() {
		// Transport.Shutdown of wanfed waits for a goroutine while it holds the
		// lock that this one may want (agent/consul/wanfed/pool.go, Close).
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = m.Shutdown()
		}()
		select {
		case <-done:
		case <-time.After(deadline):
			w.t.Errorf("the memberlist of %s does not shut down", n.name)
		}
	})
	return n
}

// plain starts alice, who has an ordinary memberlist.
func (w *world) plain(key []byte) *node {
	w.t.Helper()
	n := &node{name: "alice.dc1"}
	return w.create(n, w.config(n, 1, key))
}

// native starts the native server of a datacenter: a memberlist on Consul's
// transport, set up as in Server.setupSerfConfig (agent/consul/server_serf.go), and
// the RPC port behind which it gets its packets and streams.
func (w *world) native(dc int, c cert, key []byte) *node {
	w.t.Helper()
	name := fmt.Sprintf("dc%d", dc)
	n := &node{name: w.node(dc) + "." + name}
	conf := w.config(n, dc, key)
	tls := configurator(w.t, c)
	n.transport = w.transport(dc, tls, conf)
	conf.Transport = n.transport
	conf.RequireNodeNames = true
	conf.DisableTcpPings = false
	conf.DisableTcpPingsForNode = func(node string) bool {
		_, dc, err := wanfed.SplitNodeName(node)
		return err == nil && dc != name
	}
	w.create(n, conf)
	n.server = newServer(w.t, name, w.at(dc, 11, rpcPort), tls, func(s *server) { s.wan = n.transport })
	return n
}

// join makes a node join another as Consul's does, by name and address.
func (n *node) join(t *testing.T, other *node) {
	t.Helper()
	target := other.addr
	if n.transport != nil {
		target = other.name + "/" + other.addr
	}
	eventually(t, func() error {
		_, err := n.Join([]string{target})
		return err
	})
}

// Packets, to fit one TLS record with their frame and to need more of them; none
// can be larger than a datagram. What memberlist puts around a message is some
// dozens of bytes.
var packetSizes = []int{1, 2, 1400, 16000, 16384, 20000, 50000, 65000}

var streamSizes = []int{1, 2, 16383, 16384, 16385, 100_000, 1_000_000}

func TestGossip(t *testing.T) {
	for _, c := range []struct {
		name string
		pki  func(t testing.TB) pki
		// The certificates of native servers.
		cert func(p pki, dc, node string) cert
		key  []byte // of the gossip's own encryption
	}{
		{"certificates of culvert", culvertPKI, pki.server, nil},
		{"certificates of consul, encrypted gossip", consulPKI, pki.native, bytes.Repeat([]byte{7}, 32)},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.pki(t))
			alice := w.plain(c.key)
			betty := w.native(2, c.cert(w.pki, "dc2", "betty"), c.key)
			bonnie := w.native(3, c.cert(w.pki, "dc3", "bonnie"), c.key)
			w.startGateways(1, 2, 3)
			w.startSidecar(2, 3)

			betty.join(t, alice)
			bonnie.join(t, alice)
			alice.join(t, betty)
			all := []*node{alice, betty, bonnie}
			for _, n := range all {
				eventually(t, func() error {
					if alive := n.NumMembers(); alive != len(all) {
						return fmt.Errorf("%s sees %d members", n.name, alive)
					}
					return nil
				})
			}
			for _, from := range all {
				for _, to := range all {
					if from != to {
						converse(t, from, to)
					}
				}
			}
			for _, n := range all {
				if lost := n.lost(); len(lost) > 0 {
					t.Errorf("%s took %v for dead", n.name, lost)
				}
			}
			w.checkGossip(betty, bonnie)
		})
	}
}

// converse pings, and sends messages of all sizes by packets and by streams.
func converse(t *testing.T, from, to *node) {
	t.Helper()
	m := from.member(t, to.name)
	eventually(t, func() error {
		_, err := from.Ping(to.name, &net.UDPAddr{IP: m.Addr, Port: int(m.Port)})
		return err
	})
	for how, send := range map[string]struct {
		sizes []int
		send  func(*memberlist.Node, []byte) error
	}{
		"packet": {packetSizes, from.SendBestEffort},
		"stream": {streamSizes, from.SendReliable},
	} {
		for _, size := range send.sizes {
			msg := make([]byte, size)
			_, _ = rand.Read(msg) // never fails
			before := len(to.messages())
			if err := send.send(m, msg); err != nil {
				t.Errorf("%s to %s, %d bytes by %s: %v", from.name, to.name, size, how, err)
				continue
			}
			eventually(t, func() error {
				got := to.messages()[before:]
				if len(got) != 1 || !bytes.Equal(got[0], msg) {
					return fmt.Errorf("%s to %s, %d bytes by %s: %d messages came, or another", from.name, to.name, size, how, len(got))
				}
				return nil
			})
		}
	}
}

// checkGossip holds what the sidecar counted against what must have passed it.
func (w *world) checkGossip(natives ...*node) {
	w.t.Helper()
	for _, n := range natives {
		short, dc, _ := strings.Cut(n.name, ".")
		p := w.sidecar.peer(short)
		if p.Path != "native" || len(p.Drops) > 0 || p.PacketsReceived < uint64(len(packetSizes)) || p.PacketsSent < uint64(len(packetSizes)) {
			w.t.Errorf("status of %s: %+v", short, p)
		}
		arrived := n.server.arrivals()
		sni := " " + short + ".server." + dc + "." + domain
		for _, protocol := range []string{pool.ALPN_WANGossipPacket, pool.ALPN_WANGossipStream} {
			if !slices.Contains(arrived, protocol+sni) {
				w.t.Errorf("%s was not dialled with %s: %q", n.name, protocol, arrived)
			}
		}
	}
	for _, kind := range []string{"packet", "stream"} {
		if n := w.sidecar.metric("culvert_capture_refused_total", fmt.Sprintf("kind=%q", kind)); n != 0 {
			w.t.Errorf("%v of kind %s came past the gateways", n, kind)
		}
	}
}
