package wanfed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc/health/grpc_health_v1"

	msgpackrpc "github.com/hashicorp/consul-net-rpc/net-rpc-msgpackrpc"

	grpcint "github.com/hashicorp/consul/agent/grpc-internal"
	"github.com/hashicorp/consul/agent/grpc-internal/balancer"
	grpcresolver "github.com/hashicorp/consul/agent/grpc-internal/resolver"
	"github.com/hashicorp/consul/agent/metadata"
	"github.com/hashicorp/consul/agent/pool"
	"github.com/hashicorp/consul/agent/structs"
	"github.com/hashicorp/consul/tlsutil"
	"github.com/hashicorp/consul/types"
)

// The types of Consul's RPC port that go from one datacenter to another
// (agent/pool/conn.go), and what their connections begin with at [server.echo].
var echoed = []pool.RPCType{pool.RPCSnapshot, pool.RPCGossip}

// rpcWorld is alice and betty, both with an RPC port.
func rpcWorld(t *testing.T) (w *world, alice, betty *server) {
	t.Helper()
	w = newWorld(t, consulPKI(t))
	alice = newServer(t, "dc1", w.at(1, 11, rpcPort), nil, nil)
	betty = newServer(t, "dc2", w.at(2, 11, rpcPort), configurator(t, w.pki.native("dc2", "betty")), nil)
	w.startGateways(1, 2)
	w.startSidecar(2)
	return w, alice, betty
}

// connPool is a server's, by pool.ConnPool (agent/pool/pool.go).
func connPool(t *testing.T, dc string, cfg *tlsutil.Configurator, gateway func(string) string) *pool.ConnPool {
	t.Helper()
	p := &pool.ConnPool{
		Server: true, Datacenter: dc, TLSConfigurator: cfg, GatewayResolver: gateway,
		MaxTime: time.Minute, MaxStreams: 4, RPCHoldTimeout: time.Second,
		Logger: hclog.NewNullLogger().StandardLogger(nil),
	}
	p.SetRPCClientTimeout(deadline)
	t.Cleanup(func() { _ = p.Shutdown() })
	return p
}

// An end is one direction of RPC: who asks, by Consul's pool, and who is asked.
type end struct {
	pool     *pool.ConnPool
	dc, node string // who is asked
	addr     *net.TCPAddr
	asked    *server
	name     func(t pool.RPCType) string // what a type arrives as
}

func tcpAddr(t *testing.T, at string) *net.TCPAddr {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// RPC of a native server arrives at an unmodified one with its type byte, and the
// other way round under its protocol without it.
func TestRPC(t *testing.T) {
	w, alice, betty := rpcWorld(t)
	plain, err := tlsutil.NewConfigurator(tlsutil.Config{}, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]end{
		"from consul": {
			pool: connPool(t, "dc2", betty.tls, w.gatewayOf(2)), dc: "dc1", node: "alice", addr: tcpAddr(t, w.at(1, 1, rpcPort)),
			asked: alice, name: func(typ pool.RPCType) string { return fmt.Sprintf("type %d", typ) },
		},
		"to consul": {
			pool: connPool(t, "dc1", plain, nil), dc: "dc2", node: "betty", addr: tcpAddr(t, w.at(2, 1, rpcPort)),
			asked: betty, name: func(typ pool.RPCType) string { return typ.ALPNString() + " betty.server.dc2.consul" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			e.multiplexed(t)
			e.single(t)
			for _, typ := range echoed {
				e.echoes(t, typ)
			}
			var want []string
			for _, typ := range append([]pool.RPCType{pool.RPCMultiplexV2, pool.RPCConsul}, echoed...) {
				want = append(want, e.name(typ))
			}
			if got := e.asked.asked(); !slices.Equal(got, want) {
				t.Errorf("arrived as %q, want %q", got, want)
			}
		})
	}
}

// multiplexed calls by pool.ConnPool.RPC, which dials rpc-multi (getNewConn).
func (e end) multiplexed(t *testing.T) {
	t.Helper()
	if ok, err := e.pool.Ping(e.dc, e.node, e.addr); !ok {
		t.Fatalf("ping %s: %v", e.node, err)
	}
	for _, size := range []int{1, 16384, 1 << 20} {
		var answer []byte
		question := bytes.Repeat([]byte{'q'}, size)
		if err := e.pool.RPC(e.dc, e.node, e.addr, "Status.Echo", question, &answer); err != nil {
			t.Errorf("a call with %d bytes: %v", size, err)
		}
		if want := e.dc + " " + string(question); string(answer) != want {
			t.Errorf("a call with %d bytes was answered with %d", size, len(answer))
		}
	}
}

// single calls over a connection of the first type there was.
func (e end) single(t *testing.T) {
	t.Helper()
	c, _, err := e.pool.DialTimeout(e.dc, e.node, e.addr, pool.RPCConsul)
	if err != nil {
		t.Fatal(err)
	}
	var answer []byte
	if err := call(c, "Status.Echo", []byte("single"), &answer); err != nil || string(answer) != e.dc+" single" {
		t.Errorf("a single call: %v, %q", err, answer)
	}
}

// echoes writes to a connection, closes that direction and reads to the end.
func (e end) echoes(t *testing.T, typ pool.RPCType) {
	t.Helper()
	c, half, err := e.pool.DialTimeout(e.dc, e.node, e.addr, typ)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(deadline))
	sent := bytes.Repeat([]byte{byte(typ), 'x'}, 50_000)
	go func() { // ends with the connection
		_, _ = c.Write(sent)
		_ = half.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if want := append([]byte(typ.ALPNString()+" "), sent...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("type %d: %d bytes came back, %v, want %d", typ, len(got), err, len(want))
	}
}

// gRPC passes, by Consul's own client and server of it (agent/grpc-internal: NewHandler,
// NewClientConnPool, as in its TestNewDialer_IntegrationWithTLSEnabledHandler_viaMeshGateway).
func TestGRPC(t *testing.T) {
	w, alice, betty := rpcWorld(t)
	for _, c := range []struct {
		name, authority, from string
		to                    metadata.Server
		alpn                  grpcint.ALPNWrapper
		gateway               func(string) string
		asked                 *server
		want                  string
	}{
		{
			"from consul", "fromconsul", "dc2",
			metadata.Server{ID: "alice", Name: "alice.dc1", ShortName: "alice", Datacenter: "dc1", Addr: tcpAddr(t, w.at(1, 1, rpcPort)), UseTLS: true},
			grpcint.ALPNWrapper(betty.tls.OutgoingALPNRPCWrapper()), w.gatewayOf(2), alice, "type 8",
		},
		{
			"to consul", "toconsul", "dc1",
			metadata.Server{ID: "betty", Name: "betty.dc2", ShortName: "betty", Datacenter: "dc2", Addr: tcpAddr(t, w.at(2, 1, rpcPort))},
			nil, nil, betty, pool.ALPN_RPCGRPC + " betty.server.dc2.consul",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			servers := grpcresolver.NewServerResolverBuilder(grpcresolver.Config{Datacenter: c.from, AgentType: "server", Authority: c.authority})
			grpcresolver.Register(servers)
			defer grpcresolver.Deregister(servers.Authority())
			builder := balancer.NewBuilder(servers.Authority(), hclog.NewNullLogger())
			builder.Register()
			defer builder.Deregister()
			servers.AddServer(types.AreaWAN, &c.to)
			conns := grpcint.NewClientConnPool(grpcint.ClientConnPoolConfig{
				Servers: servers, ALPNWrapper: c.alpn, DialingFromServer: true, DialingFromDatacenter: c.from,
				UseTLSForDC: func(string) bool { return c.alpn != nil },
			})
			conns.SetGatewayResolver(c.gateway)
			conn, err := conns.ClientConn(c.to.Datacenter)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			ctx, cancel := context.WithTimeout(context.Background(), deadline)
			defer cancel()
			answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			if err != nil || answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
				t.Errorf("%v, %v", answer, err)
			}
			if got := c.asked.arrivals(); !slices.Contains(got, c.want) {
				t.Errorf("arrived as %q, want %q", got, c.want)
			}
		})
	}
}

// Types that have no protocol are refused at the end that knows: Consul's pool does
// not dial them, and the sidecar finds nobody who takes them. Raft is a datacenter's
// own; Consul's server says so where the sidecar does not ask.
func TestForeignTypes(t *testing.T) {
	w, alice, betty := rpcWorld(t)
	consul := connPool(t, "dc2", betty.tls, w.gatewayOf(2))
	for _, typ := range []pool.RPCType{pool.RPCMultiplex, pool.RPCTLS, pool.RPCTLSInsecure, 10, 0x80} {
		_, _, err := consul.DialTimeout("dc1", "alice", tcpAddr(t, w.at(1, 1, rpcPort)), typ)
		if err == nil || !strings.Contains(err.Error(), "cannot be routed through a mesh gateway") {
			t.Errorf("consul dials type %d: %v", typ, err)
		}
		w.refusedStream(t, w.at(2, 1, rpcPort), []byte{byte(typ), 'x'})
	}
	if got := betty.asked(); len(got) > 0 {
		t.Errorf("betty was reached as %q", got)
	}
	for _, typ := range []pool.RPCType{pool.RPCRaft, pool.RPCRaftForwarding} {
		w.refusedStream(t, w.at(2, 1, rpcPort), []byte{byte(typ), 'x'})
		betty.complains(t, "AuthorizeServerConn failed")
	}
	if got := alice.arrivals(); len(got) > 0 {
		t.Errorf("alice was reached as %q", got)
	}
}

// refusedStream dials a peer as alice's server and writes; the connection must end
// without an answer.
func (w *world) refusedStream(t *testing.T, at string, first []byte) {
	t.Helper()
	c, err := net.DialTCP("tcp4", &net.TCPAddr{IP: net.ParseIP(w.addr(1, 11))}, tcpAddr(t, at))
	if errors.Is(err, syscall.ECONNRESET) {
		return // the refusal was there before the dial returned
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(deadline))
	_, _ = c.Write(first) // may be reset already
	n, err := c.Read(make([]byte, 1))
	if timeout, ok := err.(net.Error); n > 0 || err == nil || ok && timeout.Timeout() {
		t.Errorf("what begins with %d has read %d bytes, %v; want its end", first[0], n, err)
	}
}

// call makes one call, as Consul's pool does (agent/pool/pool.go, rpcInsecure), and
// closes the connection.
func call(c net.Conn, method string, question, answer any) error {
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(deadline)); err != nil {
		return err
	}
	codec := msgpackrpc.NewCodecFromHandle(true, true, c, structs.MsgpackHandle)
	return msgpackrpc.CallWithCodec(codec, method, question, answer)
}
