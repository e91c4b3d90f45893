package test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/alpn"
	culvertfederation "culvert/federation"
	"culvert/federation/state"
	"culvert/internal/h2"
	"culvert/test/lab"
)

// An owner registers its entry again and again, each time with a number one
// higher, and remembers the last that was acknowledged.
type owner struct {
	node   string
	client *culvertfederation.Client
	acked  atomic.Int64
}

// owners returns n servers of dc2 which register through a gateway of the primary.
func (s *states) owners(n int) []*owner {
	var out []*owner
	for i := range n {
		o := &owner{node: fmt.Sprintf("load%d", i)}
		source := s.pki.Source("server", "dc2", o.node, "consul")
		transport := h2.NewTransport(func(ctx context.Context, address string) (*tls.Conn, error) {
			name, _, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			raw, err := s.All[1].Gateways[0].Dial("tcp", lab.HostPort(s.All[0].Gateways[0].WAN, 8443))
			if err != nil {
				return nil, err
			}
			c := tls.Client(raw, source.ClientConfig(name, []string{alpn.HTTP}))
			if err := c.HandshakeContext(ctx); err != nil {
				_ = raw.Close()
				return nil, err
			}
			return c, nil
		}, h2.TransportOptions{})
		s.t.Cleanup(transport.CloseIdleConnections)
		o.client = culvertfederation.NewClient(culvertfederation.ClientOptions{Primary: "dc1", Domain: "consul", Transport: transport})
		out = append(out, o)
	}
	return out
}

// run goes on registering until ctx ends.
func (o *owner) run(ctx context.Context, n int, total *atomic.Int64) {
	for k := o.acked.Load() + 1; ctx.Err() == nil; k++ {
		_, err := o.client.Register(ctx, state.Registration{Datacenter: "dc2", Server: &state.Server{
			Node: o.node, Advertise: netip.AddrFrom4([4]byte{127, 77, 100, byte(n + 1)}), Address: "10.72.0.99:8443",
			Version: strconv.FormatInt(k, 10), Services: []state.Service{{Name: "gossip-stream", Kind: "stream", Port: 7946}},
			Health: state.Passing, Process: state.Process{Instance: o.node, Start: o.node},
		}})
		if err == nil {
			o.acked.Store(k)
			total.Add(1)
		}
	}
}

// leader returns the member that leads the store.
func (s *states) leader() (*member, error) {
	var last error
	for _, m := range s.in("dc1") {
		st, err := m.status()
		if err != nil {
			last = err
			continue
		}
		for _, l := range s.in("dc1") {
			if l.node == st.Federation.Leader {
				return l, nil
			}
		}
	}
	return nil, fmt.Errorf("nobody leads the store: %w", last)
}

// kept makes sure that each sidecar of the primary has everything that was
// acknowledged.
func (s *states) kept(owners []*owner) {
	s.t.Helper()
	for _, m := range s.in("dc1") {
		lab.Eventually(s.t, 20*time.Second, func() error {
			_, body, err := m.sidecar.Get("/v1/federation-state/dc2")
			if err != nil {
				return err
			}
			var r state.Record
			if err := json.Unmarshal(body, &r); err != nil {
				return err
			}
			for _, o := range owners {
				entry, ok := r.Server(o.node)
				stored, err := strconv.ParseInt(entry.Version, 10, 64)
				if !ok || err != nil || stored < o.acked.Load() {
					return fmt.Errorf("%s has %q of %s, and %d was acknowledged", m.node, entry.Version, o.node, o.acked.Load())
				}
			}
			return nil
		})
	}
}

// What was acknowledged is kept, whoever is killed.
func TestFederationStoreKeepsWhatItAcknowledged(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 3, Gateways: 1}, lab.Size{Hosts: 1, Gateways: 1})
	s.begin()
	s.allKnown(30 * time.Second)
	s.allRegistered(10 * time.Second)
	owners := s.owners(8)
	ctx, stop := context.WithCancel(t.Context())
	var total atomic.Int64
	var wg sync.WaitGroup
	for i, o := range owners {
		wg.Go(func() { o.run(ctx, i, &total) })
	}
	enough := func(n int64) {
		t.Helper()
		lab.Eventually(t, 60*time.Second, func() error {
			if got := total.Load(); got < n {
				return fmt.Errorf("%d registrations were acknowledged, want %d", got, n)
			}
			return nil
		})
	}
	const kills = 5
	for i := range int64(kills) {
		enough((i + 1) * 200)
		var victim *member
		lab.Eventually(t, 20*time.Second, func() (err error) {
			victim, err = s.leader()
			return err
		})
		began := total.Load()
		victim.sidecar.Kill()
		enough(began + 50) // the others go on
		victim.sidecar.Again()
		victim.sidecar.AwaitReady()
	}
	enough(kills*200 + 200)
	stop()
	wg.Wait()
	s.kept(owners)
	t.Logf("%d registrations were acknowledged while the leader was killed %d times, and all were kept", total.Load(), kills)

	// All three at once.
	ctx, stop = context.WithCancel(t.Context())
	before := total.Load()
	for i, o := range owners {
		wg.Go(func() { o.run(ctx, i, &total) })
	}
	enough(before + 200)
	for _, m := range s.in("dc1") {
		m.sidecar.Kill()
	}
	stop()
	wg.Wait()
	for _, m := range s.in("dc1") {
		m.sidecar.Again()
	}
	s.kept(owners)
	t.Logf("all three were killed at once, and all of %d more were kept", total.Load()-before)
}
