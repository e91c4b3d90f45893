package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"culvert/config"
	"culvert/internal/alert"
	"culvert/internal/testpki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Whole gateways on loopback, with TLS servers of the test behind them: what
// passes through is real TLS, and the gateway has no key for it.

// A backend server answers each TLS connection with its name and what it was
// sent.
type backendServer struct{ addr string }

func startServer(t *testing.T, ca *testpki.CA, dc, node string) backendServer {
	t.Helper()
	cert := ca.Leaf(t, testpki.Server(dc, node))
	ln, err := tls.Listen("tcp4", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert.TLS}, MinVersion: tls.VersionTLS13})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				got, err := io.ReadAll(c)
				if err == nil {
					_, _ = fmt.Fprintf(c, "%s/%s %s", dc, node, got)
				}
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return backendServer{ln.Addr().String()}
}

func startGateway(t *testing.T, cfg config.Gateway, o Options) *Gateway {
	t.Helper()
	if cfg.Listen.Address == "" {
		cfg.Listen.Address = "127.0.0.1:0"
	}
	cfg.Admin.Address = "127.0.0.1:0"
	if cfg.Domain == "" {
		cfg.Domain = "consul"
	}
	if o.DrainTimeout == 0 {
		o.DrainTimeout = 100 * time.Millisecond
	}
	g, err := New(&cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run did not return within 10 s")
		}
	})
	return g
}

// ask goes through a gateway to whoever has the name.
func ask(t *testing.T, ca *testpki.CA, g *Gateway, name string) (string, error) {
	t.Helper()
	raw, err := net.Dial("tcp4", g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	c := tls.Client(raw, &tls.Config{ServerName: name, RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13, NextProtos: []string{"culvert/packet/1/x"}})
	if err := c.Handshake(); err != nil {
		return "", err
	}
	_, _ = io.WriteString(c, "hello")
	_ = c.CloseWrite()
	got, err := io.ReadAll(c)
	return string(got), err
}

func (g *Gateway) refusedFor(reason string) float64 {
	return testutil.ToFloat64(g.metrics.refused.WithLabelValues(reason))
}

func TestNamesLeadToTheirServers(t *testing.T) {
	ca := testpki.New(t, "consul")
	alice, bob := startServer(t, ca, "dc1", "alice"), startServer(t, ca, "dc2", "bob")
	far := startGateway(t, config.Gateway{
		Datacenter: "dc2", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "bob", Address: bob.addr, Domain: "consul"}},
	}, Options{})
	reg := prometheus.NewRegistry()
	near := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: alice.addr, Domain: "consul"}},
		Datacenters: []config.Datacenter{{Name: "dc2", Gateways: []string{far.Addr().String()}}},
	}, Options{Registry: reg})
	for name, want := range map[string]string{
		"alice.server.dc1.consul": "dc1/alice hello",
		"server.dc1.consul":       "dc1/alice hello",
		"bob.server.dc2.consul":   "dc2/bob hello",
		"BOB.server.dc2.Consul":   "dc2/bob hello",
		"server.dc2.consul":       "dc2/bob hello",
	} {
		if got, err := ask(t, ca, near, name); err != nil || got != want {
			t.Errorf("%s answered %q, %v; want %q", name, got, err, want)
		}
	}
	st := near.Status()
	b, err := json.Marshal(st)
	if err != nil || st.Kind != "gateway" || !st.Ready || len(st.Sidecars) != 1 || !st.Sidecars[0].Healthy || len(st.Gateways) != 1 {
		t.Errorf("status %s, %v", b, err)
	}
	if n := testutil.ToFloat64(near.metrics.to("dc2").ok); n != 3 {
		t.Errorf("%v connections to dc2 counted, want 3", n)
	}
}

func TestUnknownNames(t *testing.T) {
	ca := testpki.New(t, "consul")
	alice := startServer(t, ca, "dc1", "alice")
	g := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: alice.addr, Domain: "consul"}},
	}, Options{})
	names := []string{"amy.server.dc1.consul", "bob.server.dc3.consul", "alice.server.dc1.nomad", "alice.gateway.dc1.consul", "consul", "dc1.consul", "example.org"}
	for i, name := range names {
		_, err := ask(t, ca, g, name)
		if err == nil || !strings.Contains(err.Error(), "unrecognized name") {
			t.Errorf("%s: %v, want the alert unrecognized_name", name, err)
		}
		if n := g.refusedFor(reasonUnknownName); n != float64(i+1) {
			t.Errorf("%s: %v counted as unknown, want %d", name, n, i+1)
		}
	}
	// An address is no server name: the client sends none.
	if _, err := ask(t, ca, g, "127.0.0.1"); err == nil || g.refusedFor(reasonNoServerName) != 1 {
		t.Errorf("without a name: %v, counted %v times", err, g.refusedFor(reasonNoServerName))
	}
}

// A server that is down is a reset at once, not a connection that hangs.
func TestBackendDown(t *testing.T) {
	ca := testpki.New(t, "consul")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	down := ln.Addr().String()
	_ = ln.Close()
	g := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: down, Domain: "consul"}},
	}, Options{})
	began := time.Now()
	if _, err := ask(t, ca, g, "alice.server.dc1.consul"); !errors.Is(err, syscall.ECONNRESET) || time.Since(began) > 3*time.Second {
		t.Errorf("%v after %v, want a reset at once", err, time.Since(began))
	}
	if n := testutil.ToFloat64(g.metrics.to("dc1").dialFailed); n != 1 {
		t.Errorf("%v failed dials counted, want 1", n)
	}
}

// Two gateways that take each other for the other datacenter would pass a
// connection round for ever: the second time its hello comes, it is cut.
func TestLoopIsCut(t *testing.T) {
	ca := testpki.New(t, "consul")
	first := startGateway(t, config.Gateway{Datacenter: "dc1", Node: "gw"}, Options{})
	second := startGateway(t, config.Gateway{
		Datacenter: "dc2", Node: "gw", Datacenters: []config.Datacenter{{Name: "dc3", Gateways: []string{first.Addr().String()}}},
	}, Options{})
	next := *first.config.Load()
	next.Datacenters = []config.Datacenter{{Name: "dc3", Gateways: []string{second.Addr().String()}}}
	if err := first.Reload(&next); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if got, err := ask(t, ca, first, "bob.server.dc3.consul"); err == nil || time.Since(began) > 5*time.Second {
		t.Errorf("a loop answered %q, %v after %v", got, err, time.Since(began))
	}
	if n := first.refusedFor(reasonLoop) + second.refusedFor(reasonLoop); n != 1 {
		t.Errorf("%v loops counted, want 1", n)
	}
}

// A route that leads straight back is refused when the configuration is read,
// and the old one stays.
func TestRouteToItself(t *testing.T) {
	ca := testpki.New(t, "consul")
	alice := startServer(t, ca, "dc1", "alice")
	g := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: alice.addr, Domain: "consul"}},
	}, Options{})
	bad := *g.config.Load()
	bad.Datacenters = []config.Datacenter{{Name: "dc2", Gateways: []string{g.Addr().String()}}}
	if err := g.Reload(&bad); !errors.Is(err, errOwnAddress) {
		t.Errorf("a route to itself: %v", err)
	}
	moved := *g.config.Load()
	moved.Listen.Address = "127.0.0.1:9"
	if err := g.Reload(&moved); err == nil || !strings.Contains(err.Error(), "a reload cannot change listen") {
		t.Errorf("another listener: %v", err)
	}
	if got, err := ask(t, ca, g, "alice.server.dc1.consul"); err != nil || got != "dc1/alice hello" {
		t.Errorf("after reloads that were refused: %q, %v", got, err)
	}
}

func TestMalformedHellos(t *testing.T) {
	g := startGateway(t, config.Gateway{Datacenter: "dc1", Node: "gw"}, Options{HelloTimeout: 100 * time.Millisecond})
	for _, c := range []struct{ name, send, reason, answer string }{
		{"no hello", "\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00", "hello_malformed", "\x15\x03\x03\x00\x02\x02\x32"},
		{"too large", "\x16\x03\x01\x40\x00\x01\xff\xff\xff" + strings.Repeat("x", 64), "hello_too_large", "\x15\x03\x03\x00\x02\x02\x32"},
		{"half of one", "\x16\x03\x01\x01\x00\x01\x00", "hello_timeout", ""},
	} {
		conn, err := net.Dial("tcp4", g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(conn, c.send)
		got, _ := io.ReadAll(conn)
		_ = conn.Close()
		if string(got) != c.answer || g.refusedFor(c.reason) != 1 {
			t.Errorf("%s: answered % x, counted %v times as %s", c.name, got, g.refusedFor(c.reason), c.reason)
		}
	}
}

// A reset travels through, and what was passed on is counted.
func TestResetAndBytes(t *testing.T) {
	ca := testpki.New(t, "consul")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	g := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: ln.Addr().String(), Domain: "consul"}},
	}, Options{})
	var hello bytes.Buffer
	near, err := net.Dial("tcp4", g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = near.Close() }()
	_ = near.SetDeadline(time.Now().Add(10 * time.Second))
	handshake := make(chan error, 1)
	go func() {
		c := tls.Client(tee{near, &hello}, &tls.Config{ServerName: "alice.server.dc1.consul", RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13})
		handshake <- c.Handshake()
	}()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 16<<10)
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	n, err := far.Read(got)
	if err != nil {
		t.Fatal(err)
	}
	_ = far.(*net.TCPConn).SetLinger(0)
	_ = far.Close()
	if err := <-handshake; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	if !bytes.Equal(got[:n], hello.Bytes()) {
		t.Errorf("the server read %d bytes, the client had sent %d", n, hello.Len())
	}
	if in := testutil.ToFloat64(g.metrics.to("dc1").in); in != float64(n) {
		t.Errorf("%v bytes counted, want %d", in, n)
	}
}

// A stranger that stays silent after its server has refused it holds no place.
func TestRefusedStrangerHoldsNoPlace(t *testing.T) {
	ca := testpki.New(t, "consul")
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	g := startGateway(t, config.Gateway{
		Datacenter: "dc1", Node: "gw", Sidecars: []config.GatewaySidecar{{Node: "alice", Address: ln.Addr().String(), Domain: "consul"}},
	}, Options{})
	near, err := net.Dial("tcp4", g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = near.Close() }()
	_ = near.SetDeadline(time.Now().Add(10 * time.Second))
	var hello bytes.Buffer
	go func() {
		_ = tls.Client(tee{near, &hello}, &tls.Config{ServerName: "alice.server.dc1.consul", RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13}).Handshake()
	}()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	open := func() float64 { return testutil.ToFloat64(g.metrics.to("dc1").open) }
	for deadline := time.Now().Add(5 * time.Second); open() != 1 && time.Now().Before(deadline); {
		<-time.After(time.Millisecond)
	}
	alert.Refuse(far, alert.NoApplicationProtocol)
	began := time.Now()
	for open() != 0 {
		if time.Since(began) > 3*time.Second {
			t.Fatal("the gateway holds the connection 3 s after the server had closed it")
		}
		<-time.After(10 * time.Millisecond)
	}
}

// tee keeps what is written to a connection.
type tee struct {
	net.Conn
	to *bytes.Buffer
}

func (t tee) Write(b []byte) (int, error) {
	t.to.Write(b)
	return t.Conn.Write(b)
}

// An address that another process has is told with what to do about it, and so is a
// port that is for root.
func TestAddressesThatCannotBeBound(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	free := config.Listen{Address: "127.0.0.1:0"}
	for name, cfg := range map[string]config.Gateway{
		"listen": {Listen: config.Listen{Address: taken.Addr().String()}, Admin: config.Admin{Address: free.Address}},
		"admin":  {Listen: free, Admin: config.Admin{Address: taken.Addr().String()}},
	} {
		cfg.Domain = "consul"
		_, err := New(&cfg, Options{})
		var told *config.ListenError
		if !errors.As(err, &told) || !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(told.Hint(), "ss -lntp") {
			t.Errorf("%s: %v", name, err)
		}
	}
	refused := &config.ListenError{Err: os.NewSyscallError("bind", syscall.EACCES)}
	if hint := refused.Hint(); !strings.Contains(hint, "CAP_NET_BIND_SERVICE") {
		t.Errorf("the hint for a port of root's is %q", hint)
	}
}
