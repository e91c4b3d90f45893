package wanfed

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
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
	"github.com/hashicorp/consul/tlsutil"
)

// transport is Consul's, by wanfed.NewTransport (agent/consul/wanfed/wanfed.go), for
// the native server of a datacenter.
func (w *world) transport(dc int, cfg *tlsutil.Configurator, conf *memberlist.Config) *wanfed.Transport {
	w.t.Helper()
	plain, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{conf.BindAddr}, BindPort: conf.BindPort, Logger: conf.Logger,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	tr, err := wanfed.NewTransport(cfg, plain, fmt.Sprintf("dc%d", dc), w.gatewayOf(dc))
	if err != nil {
		w.t.Fatal(err)
	}
	return tr
}

// bareTransport is one without a memberlist.
func (w *world) bareTransport(dc int, c cert) *wanfed.Transport {
	w.t.Helper()
	tr := w.transport(dc, configurator(w.t, c), &memberlist.Config{
		BindAddr: w.addr(dc, 11), BindPort: gossipPort, Logger: log.New(io.Discard, "", 0),
	})
	w.t.Cleanup(func() { _ = tr.Shutdown() })
	return tr
}

// A sink stands in alice's place for packets.
type sink struct {
	*net.UDPConn
	mu  sync.Mutex
	got []string
	src []string // where each came from
}

func (w *world) newSink() *sink {
	w.t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(w.addr(1, 11)), Port: gossipPort})
	if err != nil {
		w.t.Fatal(err)
	}
	s := &sink{UDPConn: c}
	var wg sync.WaitGroup
	wg.Go(s.read)
	w.t.Cleanup(func() {
		_ = c.Close()
		wg.Wait()
	})
	return s
}

func (s *sink) read() {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := s.ReadFrom(buf)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.got, s.src = append(s.got, string(buf[:n])), append(s.src, from.String())
		s.mu.Unlock()
	}
}

func (s *sink) packets() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

// from is where the packet behind n others came from.
func (s *sink) from(n int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.src[n]
}

// next waits for the packet behind n others.
func (s *sink) next(t *testing.T, n int) string {
	t.Helper()
	eventually(t, func() error {
		if len(s.packets()) <= n {
			return fmt.Errorf("%d packets came, want %d", len(s.packets()), n+1)
		}
		return nil
	})
	return s.packets()[n]
}

// sendTo sends a packet as alice's server does.
func (s *sink) sendTo(t *testing.T, at, payload string) {
	t.Helper()
	to, err := net.ResolveUDPAddr("udp4", at)
	if err == nil {
		_, err = s.WriteTo([]byte(payload), to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// aliceAt is alice as a native server addresses her.
func (w *world) aliceAt() memberlist.Address {
	return memberlist.Address{Addr: w.at(1, 1, gossipPort), Name: "alice.dc1"}
}

// What a sidecar sends to a Consul server is one frame a TLS record, or as many
// records as the frame needs.
func TestRecords(t *testing.T) {
	w := newWorld(t, consulPKI(t))
	records := make(chan []byte, 64)
	betty := configurator(t, w.pki.native("dc2", "betty"))
	newServer(t, "dc2", w.at(2, 11, rpcPort), betty, func(s *server) {
		s.raw = func(_ string, c net.Conn) {
			defer func() { _ = c.Close() }()
			buf := make([]byte, 1<<17)
			for {
				n, err := c.Read(buf) // one record at the most
				if err != nil {
					return
				}
				records <- bytes.Clone(buf[:n])
			}
		}
	})
	alice := w.newSink()
	w.startGateways(1, 2)
	w.startSidecar(2)
	// All at once: those behind the first wait while its connection is dialled.
	sizes := []int{1, 1400, 2, 16380, 16381, 3, 40000, 65507}
	for _, size := range sizes {
		alice.sendTo(t, w.at(2, 1, gossipPort), strings.Repeat("p", size))
	}
	for _, size := range sizes {
		want := append(binary.BigEndian.AppendUint32(nil, uint32(size)), strings.Repeat("p", size)...)
		for len(want) > 0 {
			n := min(len(want), 16384) // RFC 8446 section 5.1
			select {
			case got := <-records:
				if !bytes.Equal(got, want[:n]) {
					t.Fatalf("packet of %d: a record has %d bytes, want %d", size, len(got), n)
				}
			case <-time.After(deadline):
				t.Fatalf("packet of %d: %d bytes did not come", size, len(want))
			}
			want = want[n:]
		}
	}
}

// Consul's transport sends what it is given, up to any size. The sidecar delivers
// what a datagram can hold, reads past what Consul's server would take, and ends
// the connection above that, as Consul's server does.
func TestSizesFromConsul(t *testing.T) {
	w := newWorld(t, culvertPKI(t))
	alice := w.newSink()
	w.startGateways(1, 2)
	w.startSidecar(2)
	betty := w.bareTransport(2, w.pki.native("dc2", "betty"))
	write := func(size int) {
		t.Helper()
		if _, err := betty.WriteToAddress(bytes.Repeat([]byte{'x'}, size), w.aliceAt()); err != nil && size <= wanfed.GossipPacketMaxByteSize {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	skipped := 0.0
	for i, size := range []int{1, 16380, 16384, 65507} {
		write(size)
		if got := alice.next(t, 2*i); len(got) != size {
			t.Errorf("%d bytes came as %d", size, len(got))
		}
		for _, large := range []int{0, 65508, 100_000, wanfed.GossipPacketMaxByteSize} { // 0 is a keepalive
			write(large)
			if large > 0 {
				skipped++
			}
		}
		write(2)
		if got := alice.next(t, 2*i+1); got != "xx" {
			t.Errorf("behind large packets came %d bytes", len(got))
		}
	}
	if n := w.drops("oversize"); n != skipped {
		t.Errorf("%v packets were counted as oversize, want %v", n, skipped)
	}
	if n := w.sidecar.metric("culvert_alpn_handshakes_total", `side="accept"`, `result="ok"`); n != 1 {
		t.Errorf("%v connections were made, want 1", n)
	}

	write(wanfed.GossipPacketMaxByteSize + 1)
	before := len(alice.packets())
	eventually(t, func() error { // the first ones are lost in the connection that has ended
		_, err := betty.WriteToAddress([]byte("again"), w.aliceAt())
		if err == nil && len(alice.packets()) == before {
			err = errors.New("nothing came")
		}
		return err
	})
}

// An empty frame ends a packet connection at a Consul server: its
// memberlist.NetTransport.IngestPacket refuses packets without a byte. So native
// connections cannot be kept alive by such frames, and the sidecar sends none.
func TestConsulTakesNoEmptyFrame(t *testing.T) {
	w := newWorld(t, culvertPKI(t))
	w.startGateways(2, 3)
	betty := w.native(2, w.pki.native("dc2", "betty"), nil)
	bonnie := configurator(t, w.pki.native("dc3", "bonnie"))
	c, _, err := pool.DialRPCViaMeshGateway(context.Background(), "dc2", "betty", nil, bonnie.OutgoingALPNRPCWrapper(),
		pool.ALPN_WANGossipPacket, true, w.gatewayOf(3))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := c.Write(make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection has %v, want its end", err)
	}
	betty.server.complains(t, "packet too short")
}

// Where the far side has ended a connection, Consul's transport loses what it
// writes next: it reads nothing, so that it cannot know. A sidecar sees the end,
// and has dialled again before the next packet.
func TestEndedConnections(t *testing.T) {
	w := newWorld(t, culvertPKI(t))
	bettys := w.pki.native("dc2", "betty")
	arrived := make(chan string, 16)
	server := newServer(t, "dc2", w.at(2, 11, rpcPort), configurator(t, bettys), func(s *server) {
		s.raw = func(_ string, c net.Conn) {
			defer func() { _ = c.Close() }()
			for {
				var length uint32
				if binary.Read(c, binary.BigEndian, &length) != nil {
					return
				}
				p := make([]byte, min(length, 100))
				if _, err := io.ReadFull(c, p); err != nil {
					return
				}
				arrived <- string(p)
			}
		}
	})
	alice := w.newSink()
	w.startGateways(1, 2)
	w.startSidecar(2)
	betty := w.bareTransport(2, bettys)

	t.Run("of consul", func(t *testing.T) {
		if _, err := betty.WriteToAddress([]byte("first"), w.aliceAt()); err != nil || alice.next(t, 0) != "first" {
			t.Fatalf("%v, %q", err, alice.packets())
		}
		w.sidecar.Stop()
		w.startSidecar(2)
		sent, failed := 0, 0
		eventually(t, func() error {
			if len(alice.packets()) > 1 {
				return nil
			}
			sent++
			if _, err := betty.WriteToAddress(fmt.Appendf(nil, "packet %d", sent), w.aliceAt()); err != nil {
				failed++
			}
			return fmt.Errorf("of %d packets none came", sent)
		})
		came := alice.packets()[1]
		if came == "packet 1" {
			t.Error("nothing was lost: this is better than it was")
		}
		t.Logf("the first to arrive after a restart is %q; %d writes failed", came, failed)
	})
	t.Run("of culvert", func(t *testing.T) {
		take := func(want string) {
			t.Helper()
			select {
			case got := <-arrived:
				if got != want {
					t.Errorf("%q came, want %q", got, want)
				}
			case <-time.After(deadline):
				t.Fatalf("%q did not come", want)
			}
		}
		for i := range 3 {
			alice.sendTo(t, w.at(2, 1, gossipPort), fmt.Sprintf("packet %d", i))
			take(fmt.Sprintf("packet %d", i))
			before := len(server.arrivals())
			server.hangUp()
			eventually(t, func() error {
				if n := len(server.arrivals()); n != before+1 {
					return fmt.Errorf("%d connections, want %d", n, before+1)
				}
				return nil
			})
		}
	})
}

// The cases of Consul's TestSplitNodeName (agent/consul/wanfed/wanfed_test.go). What
// is an error there is none here, as far as it can be a name in DNS.
func TestNodeNames(t *testing.T) {
	w := newWorld(t, culvertPKI(t))
	w.nodes = map[int]string{2: "web.1"} // foo.bar.baz, in Consul's case
	alice := w.newSink()
	received := newPacketTransport(t, w, 2, "web.1")
	w.startGateways(1, 2, 3)
	w.startSidecar(2)

	t.Run("consul", func(t *testing.T) {
		bonnie := w.bareTransport(3, w.pki.native("dc3", "bonnie"))
		for name, want := range map[string]string{
			"":          "does not encode a datacenter",
			"foo":       "does not encode a datacenter",
			"web.1.dc2": "does not encode a datacenter",
			".dc1":      "without a target node",
			"alice.dc9": "unrecognized name", // no such datacenter at the gateway
		} {
			to := memberlist.Address{Name: name, Addr: w.at(2, 1, gossipPort)}
			_, err := bonnie.WriteToAddress([]byte("packet"), to)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("packet to %q: %v, want %q", name, err, want)
			}
			if _, err = bonnie.DialAddressTimeout(to, time.Second); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("stream to %q: %v, want %q", name, err, want)
			}
		}
	})
	t.Run("culvert", func(t *testing.T) {
		alice.sendTo(t, w.at(2, 1, gossipPort), "to a node with a dot")
		select {
		case p := <-received.PacketCh():
			if string(p.Buf) != "to a node with a dot" {
				t.Errorf("%q came", p.Buf)
			}
		case <-time.After(deadline):
			t.Fatal("nothing came")
		}
		// From such a node, as Consul's transport can address alice.
		if _, err := received.WriteToAddress([]byte("from it"), w.aliceAt()); err != nil || alice.next(t, 0) != "from it" {
			t.Errorf("%v, %q", err, alice.packets())
		}
		if from := alice.from(0); from != w.at(2, 1, gossipPort) {
			t.Errorf("it came from %s", from)
		}
	})
}

// newPacketTransport is a native server whose packets the test takes itself.
func newPacketTransport(t *testing.T, w *world, dc int, node string) *wanfed.Transport {
	t.Helper()
	name := fmt.Sprintf("dc%d", dc)
	c := w.pki.native(name, node)
	tr := w.bareTransport(dc, c)
	newServer(t, name, w.at(dc, 11, rpcPort), configurator(t, c), func(s *server) { s.wan = tr })
	return tr
}
