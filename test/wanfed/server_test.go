package wanfed

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	msgpackrpc "github.com/hashicorp/consul-net-rpc/net-rpc-msgpackrpc"
	"github.com/hashicorp/consul-net-rpc/net/rpc"

	"github.com/hashicorp/consul/agent/consul/rate"
	"github.com/hashicorp/consul/agent/consul/wanfed"
	grpcint "github.com/hashicorp/consul/agent/grpc-internal"
	"github.com/hashicorp/consul/agent/pool"
	"github.com/hashicorp/consul/agent/structs"
	"github.com/hashicorp/consul/tlsutil"
)

// handshakeTimeout is limits.rpc_handshake_timeout (agent/config/default.go).
const handshakeTimeout = 5 * time.Second

// A server does with its RPC port what Consul's does (agent/consul/rpc.go), which
// exports none of it. With a configurator it takes TLS, without one it is a server
// that knows only of type bytes.
type server struct {
	t    testing.TB
	dc   string
	tls  *tlsutil.Configurator             // nil: no TLS
	wan  wanfed.IngestionAwareTransport    // nil: no native gossip
	rpc  *rpc.Server                       // Consul's fork of net/rpc
	grpc *grpcint.Handler                  // agent/grpc-internal/handler.go
	addr *net.TCPAddr                      // of the RPC port
	wg   sync.WaitGroup                    // its goroutines
	raw  func(protocol string, c net.Conn) // if set, takes what would be routed

	// incoming is how TLS is taken; Consul's way unless it is set.
	incoming func() *tls.Config

	mu      sync.Mutex
	open    []net.Conn
	arrived []string // protocols, or types, in their order
	errs    []error
}

// newServer listens, and serves until the test ends. change may set what is to be
// different before that.
func newServer(t testing.TB, dc, at string, cfg *tlsutil.Configurator, change func(s *server)) *server {
	t.Helper()
	ln, err := net.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := ln.Addr().(*net.TCPAddr) // of a TCP listener
	s := &server{t: t, dc: dc, tls: cfg, rpc: rpc.NewServer(), addr: addr}
	if err := s.rpc.RegisterName("Status", status{dc}); err != nil {
		t.Fatal(err)
	}
	s.grpc = grpcint.NewHandler(hclog.NewNullLogger(), addr, func(g *grpc.Server) {
		grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	}, nil, rate.NullRequestLimitsHandler())
	s.incoming = func() *tls.Config { return cfg.IncomingALPNRPCConfig(pool.RPCNextProtos) }
	if change != nil {
		change(s)
	}
	s.wg.Go(func() { _ = s.grpc.Run() }) // ended by Shutdown
	s.wg.Go(func() { s.listen(ln) })
	t.Cleanup(func() {
		_ = ln.Close()
		s.hangUp()
		_ = s.grpc.Shutdown()
		s.wg.Wait()
	})
	return s
}

// A status answers RPCs: Consul's own Status.Ping (agent/consul/status_endpoint.go),
// and one that carries something.
type status struct{ dc string }

// Ping is what pool.ConnPool.Ping calls.
func (status) Ping(struct{}, *struct{}) error { return nil }

// Echo returns what it is asked, and where.
func (s status) Echo(question []byte, answer *[]byte) error {
	*answer = append([]byte(s.dc+" "), question...)
	return nil
}

// listen is Server.listen (agent/consul/rpc.go) without the limit of connections.
func (s *server) listen(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.open = append(s.open, conn)
		s.mu.Unlock()
		s.wg.Go(func() { s.handleConn(conn) })
	}
}

// hangUp closes all connections, as a server that ends does.
func (s *server) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.open {
		_ = c.Close()
	}
	s.open = nil
}

func (s *server) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrived = append(s.arrived, what)
}

func (s *server) fault(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, err)
}

// complains waits until the last error says something, and takes all away.
func (s *server) complains(t *testing.T, of string) {
	t.Helper()
	eventually(t, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := len(s.errs); n == 0 || !strings.Contains(s.errs[n-1].Error(), of) {
			return fmt.Errorf("the server says %v, want %q", s.errs, of)
		}
		s.errs = nil
		return nil
	})
}

// arrivals is what came so far.
func (s *server) arrivals() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.arrived)
}

// asked is what came so far beside packet connections, which a sidecar makes at its
// start.
func (s *server) asked() []string {
	return slices.DeleteFunc(s.arrivals(), func(what string) bool { return strings.HasPrefix(what, pool.ALPN_WANGossipPacket) })
}

// handleConn is Server.handleConn (agent/consul/rpc.go).
func (s *server) handleConn(conn net.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
	if s.tls != nil && s.tls.MutualTLSCapable() {
		peeked, native, err := pool.PeekForTLS(conn)
		if err != nil {
			_ = conn.Close()
			return
		}
		if native {
			s.handleNativeTLS(peeked)
			return
		}
		conn = peeked
	}
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		_ = conn.Close()
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	typ := pool.RPCType(first[0])
	s.note(fmt.Sprintf("type %d", typ))
	if s.tls != nil && s.tls.VerifyIncomingRPC() {
		_ = conn.Close()
		return
	}
	protocol := typ.ALPNString()
	if typ == pool.RPCRaftForwarding {
		protocol = pool.ALPN_RPCRaftForwarding // which ALPNString does not know
	}
	s.route(protocol, conn)
}

// handleNativeTLS is Server.handleNativeTLS (agent/consul/rpc.go).
func (s *server) handleNativeTLS(conn net.Conn) {
	c := tls.Server(conn, s.incoming())
	if err := c.Handshake(); err != nil {
		s.fault(fmt.Errorf("handshake: %w", err))
		_ = conn.Close()
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	protocol := c.ConnectionState().NegotiatedProtocol
	s.note(protocol + " " + c.ConnectionState().ServerName)
	if s.raw != nil {
		s.raw(protocol, c)
		return
	}
	switch protocol {
	case pool.ALPN_WANGossipPacket:
		if err := s.handlePackets(c); err != nil && !errors.Is(err, io.EOF) {
			s.fault(err)
		}
	case pool.ALPN_WANGossipStream:
		if err := s.wan.IngestStream(c); err != nil {
			s.fault(err)
		}
	default:
		s.route(protocol, c)
	}
}

// route is the switches in handleConn and handleNativeTLS. What needs more of a
// server than there is here, snapshots, raft and Enterprise's rpc-gossip, is
// answered with its name and what came.
func (s *server) route(protocol string, c net.Conn) {
	switch protocol {
	case pool.ALPN_RPCConsul:
		s.handleConsul(c)
	case pool.ALPN_RPCMultiplexV2:
		s.handleMultiplex(c)
	case pool.ALPN_RPCGRPC:
		s.grpc.Handle(c)
	case pool.ALPN_RPCRaft, pool.ALPN_RPCRaftForwarding:
		if secure, ok := c.(*tls.Conn); ok { // handleRaftRPC and handleRaftForwarding
			if err := s.tls.AuthorizeServerConn(s.dc, secure); err != nil {
				s.fault(err)
				_ = c.Close()
				return
			}
		}
		s.echo(protocol, c)
	case pool.ALPN_RPCSnapshot, pool.ALPN_RPCGossip:
		s.echo(protocol, c)
	default:
		s.fault(fmt.Errorf("nothing is done with %q", protocol))
		_ = c.Close()
	}
}

// handlePackets is Server.handleALPN_WANGossipPacketStream with its readUint32 and
// limitedConn (agent/consul/rpc.go).
func (s *server) handlePackets(c net.Conn) error {
	defer func() { _ = c.Close() }()
	for {
		if err := c.SetReadDeadline(time.Now().Add(wanfed.GossipPacketMaxIdleTime)); err != nil {
			return err
		}
		var length uint32
		if err := binary.Read(c, binary.BigEndian, &length); err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
		if length > wanfed.GossipPacketMaxByteSize {
			return fmt.Errorf("packet of %d bytes", length)
		}
		if err := s.wan.IngestPacket(&limited{c, io.LimitReader(c, int64(length))}, c.RemoteAddr(), time.Now(), false); err != nil {
			return err
		}
	}
}

type limited struct {
	net.Conn
	r io.Reader
}

func (l *limited) Read(p []byte) (int, error) { return l.r.Read(p) }

// handleConsul is Server.handleConsulConn (agent/consul/rpc.go).
func (s *server) handleConsul(c net.Conn) {
	defer func() { _ = c.Close() }()
	codec := msgpackrpc.NewCodecFromHandle(true, true, c, structs.MsgpackHandle)
	for s.rpc.ServeRequest(codec) == nil {
		continue
	}
}

// handleMultiplex is Server.handleMultiplexV2 (agent/consul/rpc.go).
func (s *server) handleMultiplex(c net.Conn) {
	defer func() { _ = c.Close() }()
	conf := yamux.DefaultConfig()
	conf.LogOutput = io.Discard
	session, err := yamux.Server(c, conf)
	if err != nil {
		s.fault(err)
		return
	}
	defer func() { _ = session.Close() }()
	for {
		sub, err := session.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() {
			peeked, first, err := pool.PeekFirstByte(sub)
			if err != nil || first == byte(pool.RPCGossip) {
				_ = sub.Close()
				return
			}
			s.handleConsul(peeked)
		})
	}
}

// echo answers with the name of the protocol and whatever comes.
func (s *server) echo(protocol string, c net.Conn) {
	defer func() { _ = c.Close() }()
	if _, err := io.WriteString(c, protocol+" "); err == nil {
		_, _ = io.Copy(c, c)
	}
}
