package capture

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/catalog"
	"culvert/internal/testnetns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(testnetns.Main(m)) }

// These tests use real sockets on addresses of 127.0.0.0/8: binding several of
// them to one port is what the package does.

var (
	self  = catalog.Key{Datacenter: "dc1", Node: "alice"}
	bob   = catalog.Key{Datacenter: "dc2", Node: "bob"}
	carol = catalog.Key{Datacenter: "dc2", Node: "carol"}

	serverAddr = netip.MustParseAddr("127.91.0.1")
	selfAddr   = netip.MustParseAddr("127.91.1.1")
	bobAddr    = netip.MustParseAddr("127.91.2.1")
	carolAddr  = netip.MustParseAddr("127.91.2.2")
)

type captured struct {
	to      catalog.Key
	service string
	payload string
}

// recorder keeps packets and answers streams with a line about themselves.
type recorder struct {
	packets chan captured
}

func (r *recorder) Packet(to catalog.Key, service string, payload []byte, _ bool) {
	r.packets <- captured{to, service, string(payload)}
}

func (r *recorder) Stream(_ context.Context, to catalog.Key, service string, c *net.TCPConn) {
	_, _ = io.WriteString(c, "to "+to.String()+" "+service+"\n")
	_ = c.Close()
}

// A host is a local server's ports and a Bind before them.
type host struct {
	bind     *Bind
	handler  *recorder
	udp      *net.UDPConn // the server's own
	tcp      *net.TCPListener
	port     uint16
	wrong    chan struct{}
	services []Service
}

// newHost finds one port that is free on every address used here.
func newHost(t *testing.T, hairpin bool, peers ...catalog.Peer) *host {
	t.Helper()
	h := &host{handler: &recorder{packets: make(chan captured, 64)}, wrong: make(chan struct{}, 64)}
	h.udp, h.tcp = serverSockets(t)
	h.port = h.udp.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	local := netip.AddrPortFrom(serverAddr, h.port)
	h.services = []Service{
		{Name: "gossip-packet", Packet: true, Port: h.port, Local: local},
		{Name: "gossip-stream", Port: h.port, Local: local},
	}
	var err error
	h.bind, err = NewBind(peers, BindOptions{
		Self: self, Server: serverAddr, Advertise: selfAddr, Hairpin: hairpin, Services: h.services,
		Handler: h.handler, WrongSource: func() { h.wrong <- struct{}{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, h.bind)
	return h
}

// run runs a Bind until the test ends.
func run(t *testing.T, b *Bind) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func serverSockets(t *testing.T) (*net.UDPConn, *net.TCPListener) {
	t.Helper()
	for range 50 {
		ln, err := net.Listen("tcp4", netip.AddrPortFrom(serverAddr, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(ln.Addr().(*net.TCPAddr).AddrPort()))
		if err != nil {
			_ = ln.Close()
			continue
		}
		t.Cleanup(func() { _ = ln.Close(); _ = udp.Close() })
		return udp, ln.(*net.TCPListener)
	}
	t.Fatal("no port that is free for both UDP and TCP")
	return nil, nil
}

func peer(k catalog.Key, a netip.Addr) catalog.Peer { return catalog.Peer{Key: k, Advertise: a} }

// serverSends sends a datagram from the server's own socket.
func (h *host) serverSends(t *testing.T, to netip.Addr, payload string) {
	t.Helper()
	if _, err := h.udp.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(to, h.port)); err != nil {
		t.Fatal(err)
	}
}

// serverReads reads one datagram at the server.
func (h *host) serverReads(t *testing.T) (string, netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 65536)
	_ = h.udp.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := h.udp.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n]), from
}

func (h *host) next(t *testing.T) captured {
	t.Helper()
	select {
	case c := <-h.handler.packets:
		return c
	case <-time.After(5 * time.Second):
		t.Fatal("nothing was captured within 5 s")
		return captured{}
	}
}

func dialFrom(t *testing.T, from netip.Addr, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp4", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return c.(*net.TCPConn)
}

func TestPacketsGoToTheOwnerOfTheirAddress(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr), peer(carol, carolAddr))
	h.serverSends(t, bobAddr, "for bob")
	if got, want := h.next(t), (captured{bob, "gossip-packet", "for bob"}); got != want {
		t.Errorf("captured %v, want %v", got, want)
	}
	large := strings.Repeat("x", 60000)
	h.serverSends(t, carolAddr, large)
	if got, want := h.next(t), (captured{carol, "gossip-packet", large}); got != want {
		t.Errorf("captured %d bytes for %v, want %d for %v", len(got.payload), got.to, len(large), carol)
	}
}

func TestPacketsFromElsewhereAreRefused(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	stranger, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 91, 9, 9)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Close() }()
	if _, err := stranger.WriteToUDPAddrPort([]byte("spoof"), netip.AddrPortFrom(bobAddr, h.port)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.wrong:
	case <-time.After(5 * time.Second):
		t.Fatal("WrongSource was not called within 5 s")
	}
	h.serverSends(t, bobAddr, "real")
	if got := h.next(t); got.payload != "real" {
		t.Errorf("captured %q, want only the server's packet", got.payload)
	}
}

func TestDeliverComesFromTheSendersAddress(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	if err := deliver(h.bind, bob, "gossip-packet", []byte("hello")); err != nil {
		t.Fatal(err)
	}
	payload, from := h.serverReads(t)
	if want := netip.AddrPortFrom(bobAddr, h.port); payload != "hello" || from != want {
		t.Errorf("the server read %q from %v, want hello from %v", payload, from, want)
	}
	for _, c := range []struct {
		from    catalog.Key
		service string
	}{{carol, "gossip-packet"}, {bob, "other"}} {
		if err := deliver(h.bind, c.from, c.service, []byte("x")); !errors.Is(err, ErrNoEndpoint) {
			t.Errorf("Deliver(%v, %s): %v, want ErrNoEndpoint", c.from, c.service, err)
		}
	}
}

func TestDeliverAllocatesNothing(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	for _, count := range []int{1, 40} {
		packets := slices.Repeat([][]byte{make([]byte, 600)}, count)
		if n := testing.AllocsPerRun(200, func() { _, _ = h.bind.Deliver(bob, "gossip-packet", packets) }); n > 0 {
			t.Errorf("Deliver allocates %v objects for %d packets", n, count)
		}
	}
}

// Many packets at once arrive as one at a time would: in their order, each whole,
// from the sender's address.
func TestDeliverMany(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	var packets [][]byte
	for i := range 2*batchSize + 3 {
		packets = append(packets, bytes.Repeat([]byte{byte(i)}, 1+100*i))
	}
	if n, err := h.bind.Deliver(bob, "gossip-packet", packets); n != len(packets) || err != nil {
		t.Fatalf("%d of %d packets, %v", n, len(packets), err)
	}
	buf := make([]byte, 1<<16)
	for i, want := range packets {
		_ = h.udp.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, from, err := h.udp.ReadFromUDPAddrPort(buf)
		if err != nil || !bytes.Equal(buf[:n], want) || from != netip.AddrPortFrom(bobAddr, h.port) {
			t.Fatalf("packet %d: %d bytes from %v, %v", i, n, from, err)
		}
	}
	// One that the kernel refuses is told, and costs no other.
	packets = [][]byte{[]byte("1"), make([]byte, maxDatagram), []byte("3")}
	n, err := h.bind.Deliver(bob, "gossip-packet", packets)
	if n != 1 || !errors.Is(err, syscall.EMSGSIZE) {
		t.Fatalf("%d packets, %v", n, err)
	}
}

func TestStreamsGoToTheOwnerOfTheirAddress(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	c := dialFrom(t, serverAddr, netip.AddrPortFrom(bobAddr, h.port))
	line, err := io.ReadAll(c)
	if err != nil || string(line) != "to dc2/bob gossip-stream\n" {
		t.Errorf("read %q, %v", line, err)
	}
}

func TestDialServerComesFromThePeersAddress(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	for _, c := range []struct {
		from catalog.Key
		want netip.Addr // not valid: any
	}{{bob, bobAddr}, {self, selfAddr}, {carol, netip.Addr{}}} {
		dialled, err := h.bind.DialServer(t.Context(), c.from, "gossip-stream")
		if err != nil {
			t.Fatal(err)
		}
		_ = h.tcp.SetDeadline(time.Now().Add(5 * time.Second))
		accepted, err := h.tcp.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		got := accepted.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
		if c.want.IsValid() && got != c.want {
			t.Errorf("the server saw %v for %v, want %v", got, c.from, c.want)
		}
		_ = accepted.Close()
		_ = dialled.Close()
	}
	if _, err := h.bind.DialServer(t.Context(), bob, "gossip-packet"); err == nil {
		t.Error("DialServer of a packet service succeeded")
	}
}

func TestHairpin(t *testing.T) {
	h := newHost(t, true)
	h.serverSends(t, selfAddr, "to myself")
	payload, from := h.serverReads(t)
	if want := netip.AddrPortFrom(selfAddr, h.port); payload != "to myself" || from != want {
		t.Errorf("the server read %q from %v, want it from %v", payload, from, want)
	}
	near := dialFrom(t, serverAddr, netip.AddrPortFrom(selfAddr, h.port))
	_ = h.tcp.SetDeadline(time.Now().Add(5 * time.Second))
	far, err := h.tcp.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	if got := far.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != selfAddr {
		t.Errorf("the server's own connection came from %v, want %v", got, selfAddr)
	}
	if _, err := io.WriteString(near, "ping"); err != nil {
		t.Fatal(err)
	}
	_ = near.CloseWrite()
	if got, err := io.ReadAll(far); err != nil || string(got) != "ping" {
		t.Errorf("through the hairpin: %q, %v", got, err)
	}
}

// The server's connections to itself are waited for when a sidecar stops, as
// those to its peers are, and then cut off.
func TestHairpinsAreDrained(t *testing.T) {
	h := newHost(t, true)
	connect := func() (near, far *net.TCPConn) {
		near = dialFrom(t, serverAddr, netip.AddrPortFrom(selfAddr, h.port))
		_ = h.tcp.SetDeadline(time.Now().Add(5 * time.Second))
		far, err := h.tcp.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = far.Close() })
		return near, far
	}
	endingNear, endingFar := connect()
	near, _ := connect()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	left := make(chan int)
	go func() { left <- h.bind.Drain(ctx) }()
	for begun := false; !begun; {
		remove, ok := h.bind.hairpins.Add(new(net.TCPConn))
		remove()
		begun = !ok
	}
	if err := h.serverDialsItself(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new connection during the drain: %v, want a reset", err)
	}
	if _, err := io.WriteString(endingFar, "bye"); err != nil {
		t.Fatal(err)
	}
	_ = endingFar.Close()
	if got, err := io.ReadAll(endingNear); err != nil || string(got) != "bye" {
		t.Errorf("during the drain: %q, %v", got, err)
	}
	_ = endingNear.Close()
	select {
	case n := <-left:
		t.Fatalf("drained with %d left while a connection was open", n)
	case <-time.After(50 * time.Millisecond):
	}
	cancel()
	if n := <-left; n != 1 {
		t.Errorf("%d connections were cut off, want 1", n)
	}
	_ = near.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after the drain: %v, want a reset", err)
	}
}

// A hairpin to a server that is down is refused as the server itself would.
func TestHairpinToAServerThatIsDown(t *testing.T) {
	h := newHost(t, true)
	_ = h.tcp.Close()
	if err := h.serverDialsItself(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("dial and read: %v, want a reset", err)
	}
}

// serverDialsItself returns how a connection through the hairpin ends.
func (h *host) serverDialsItself() error {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: serverAddr.AsSlice()}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp4", netip.AddrPortFrom(selfAddr, h.port).String())
	if err != nil { // the reset may come as early as that
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = c.Read(make([]byte, 1))
	return err
}

func TestHairpinWhereTheServerHasTheAddress(t *testing.T) {
	udp, ln := serverSockets(t)
	defer func() { _ = udp.Close(); _ = ln.Close() }()
	port := udp.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	own, err := net.ListenUDP("udp4", &net.UDPAddr{IP: selfAddr.AsSlice(), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	b, err := NewBind(nil, BindOptions{
		Self: self, Server: serverAddr, Advertise: selfAddr, Hairpin: true, Handler: &recorder{},
		Services: []Service{{Name: "p", Packet: true, Port: port, Local: netip.AddrPortFrom(serverAddr, port)}},
	})
	if err != nil {
		t.Fatalf("the server's own address in use is no fault: %v", err)
	}
	b.Close()
}

func TestSetTouchesNobodyElse(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	before := h.bind.endpoints[endpointKey{netip.AddrPortFrom(bobAddr, h.port), true}]
	if err := h.bind.Set([]catalog.Peer{peer(bob, bobAddr), peer(carol, carolAddr)}); err != nil {
		t.Fatal(err)
	}
	h.serverSends(t, carolAddr, "for carol")
	if got := h.next(t); got.to != carol {
		t.Errorf("captured for %v, want %v", got.to, carol)
	}
	if after := h.bind.endpoints[endpointKey{netip.AddrPortFrom(bobAddr, h.port), true}]; after != before {
		t.Error("bob's socket was opened again")
	}

	// Two peers that change places keep both sockets.
	if err := h.bind.Set([]catalog.Peer{peer(bob, carolAddr), peer(carol, bobAddr)}); err != nil {
		t.Fatal(err)
	}
	h.serverSends(t, carolAddr, "for bob now")
	if got := h.next(t); got.to != bob {
		t.Errorf("captured for %v, want %v", got.to, bob)
	}
	if err := deliver(h.bind, carol, "gossip-packet", []byte("moved")); err != nil {
		t.Fatal(err)
	}
	if _, from := h.serverReads(t); from.Addr() != bobAddr {
		t.Errorf("carol's packet came from %v, want %v", from.Addr(), bobAddr)
	}

	// A peer that leaves frees its sockets.
	if err := h.bind.Set(nil); err != nil {
		t.Fatal(err)
	}
	again, err := net.ListenUDP("udp4", &net.UDPAddr{IP: bobAddr.AsSlice(), Port: int(h.port)})
	if err != nil {
		t.Fatalf("the address of a peer that left is still in use: %v", err)
	}
	_ = again.Close()
}

func TestSetIsAllOrNothing(t *testing.T) {
	h := newHost(t, false, peer(bob, bobAddr))
	taken, err := net.ListenUDP("udp4", &net.UDPAddr{IP: carolAddr.AsSlice(), Port: int(h.port)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	dave := catalog.Key{Datacenter: "dc2", Node: "dave"}
	daveAddr := netip.MustParseAddr("127.91.2.3")
	err = h.bind.Set([]catalog.Peer{peer(carol, carolAddr), peer(dave, daveAddr)})
	fault, ok := errors.AsType[*EndpointError](err)
	if !ok || fault.Peer != carol || !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("Set: %v, want carol's endpoint in use", err)
	}
	if hint := fault.Hint(); !strings.Contains(hint, "ss -lnp") {
		t.Errorf("hint %q does not say how to find out", hint)
	}
	h.serverSends(t, bobAddr, "still here")
	if got := h.next(t); got.to != bob {
		t.Errorf("bob lost his endpoint: captured for %v", got.to)
	}
	free, err := net.ListenUDP("udp4", &net.UDPAddr{IP: daveAddr.AsSlice(), Port: int(h.port)})
	if err != nil {
		t.Fatalf("dave's endpoint was left open: %v", err)
	}
	_ = free.Close()
}

func TestServerOnAllAddresses(t *testing.T) {
	all, err := net.ListenUDP("udp4", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = all.Close() }()
	port := all.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	_, err = NewBind([]catalog.Peer{peer(bob, bobAddr)}, BindOptions{
		Self: self, Server: serverAddr, Advertise: selfAddr, Handler: &recorder{},
		Services: []Service{{Name: "p", Packet: true, Port: port, Local: netip.AddrPortFrom(serverAddr, port)}},
	})
	fault, ok := errors.AsType[*EndpointError](err)
	if !ok || !strings.Contains(fault.Hint(), "all addresses") || !strings.Contains(fault.Hint(), "bind the server to one address") {
		t.Errorf("error %v does not name the remedy", err)
	}
}

func TestAddressThatIsNotLocal(t *testing.T) {
	for _, c := range []struct{ addr, hint string }{
		{"192.0.2.1", "ip addr add 192.0.2.1/32 dev lo"},
		{"2001:db8::1", "ip -6 route add local 2001:db8::1/128 dev lo"},
	} {
		a := netip.MustParseAddr(c.addr)
		_, err := NewBind([]catalog.Peer{peer(bob, a)}, BindOptions{
			Self: self, Server: serverAddr, Advertise: selfAddr, Handler: &recorder{},
			Services: []Service{{Name: "p", Packet: true, Port: 17946, Local: netip.AddrPortFrom(serverAddr, 7946)}},
		})
		fault, ok := errors.AsType[*EndpointError](err)
		if !ok || !errors.Is(err, syscall.EADDRNOTAVAIL) || !strings.Contains(fault.Hint(), c.hint) {
			t.Errorf("%s: %v (hint %q), want EADDRNOTAVAIL and %q", c.addr, err, fault.Hint(), c.hint)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	good := BindOptions{Server: serverAddr, Advertise: selfAddr, Handler: &recorder{}, Services: []Service{{}}}
	for field, spoil := range map[string]func(*BindOptions){
		"Server":     func(o *BindOptions) { o.Server = netip.Addr{} },
		"Advertise":  func(o *BindOptions) { o.Advertise = netip.Addr{} },
		"Handler":    func(o *BindOptions) { o.Handler = nil },
		"Services":   func(o *BindOptions) { o.Services = nil },
		"MaxStreams": func(o *BindOptions) { o.MaxStreams = -1 },
	} {
		o := good
		spoil(&o)
		if _, err := NewBind(nil, o); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("spoilt %s: error %v does not name it", field, err)
		}
	}
}
