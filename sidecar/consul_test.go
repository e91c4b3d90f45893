package sidecar

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"culvert/certs"
	"culvert/config"
	"culvert/internal/testpki"
)

const rpcPort = port + 1

// consul is alice beside a Consul server, whose RPC port is the test's, and bob,
// who is what the test makes of him.
type consul struct {
	*pair
	registry *prometheus.Registry // alice's
	rpc      *net.TCPListener
}

func newConsul(t *testing.T, change func(cfg *config.Sidecar)) *consul {
	t.Helper()
	p := &pair{ca: testpki.New(t, "consul"), n: byte(150 + ranges.Add(1))}
	cfg := p.config(t, 1, "alice")
	local := netip.AddrPortFrom(cfg.Server.Address, rpcPort)
	cfg.Services = append(cfg.Services, config.Service{Name: "rpc", Kind: "stream", Port: rpcPort, Local: local, Types: true})
	change(cfg)
	rpc, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(local))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rpc.Close() })
	p.alice = p.start(t, cfg)
	return &consul{p, p.alice.registry, rpc}
}

func (c *consul) leaf(t *testing.T, dc, node string) tls.Certificate {
	t.Helper()
	return c.ca.Leaf(t, testpki.Server(dc, node)).TLS
}

// native runs bob as a native server: it speaks Consul's protocols alone, and says
// what was negotiated and what came.
func (c *consul) native(t *testing.T) <-chan string {
	t.Helper()
	ln, err := tls.Listen("tcp4", c.addr(2, 200).String()+":8443", &tls.Config{
		Certificates: []tls.Certificate{c.leaf(t, "dc2", "bob")}, ClientAuth: tls.RequireAnyClientCert,
		NextProtos: []string{"consul/rpc-multi", "consul/rpc-snapshot", "consul/wan-gossip/packet"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	got := make(chan string, 16)
	go func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = raw.Close() }()
				conn, _ := raw.(*tls.Conn) // of a tls.Listener
				if conn.Handshake() != nil || conn.ConnectionState().NegotiatedProtocol == "consul/wan-gossip/packet" {
					return
				}
				all, _ := io.ReadAll(conn)
				got <- conn.ConnectionState().NegotiatedProtocol + " " + string(all)
				_, _ = io.WriteString(conn, "answer")
			}()
		}
	}()
	return got
}

// call sends what a Consul server would to bob's RPC port.
func (c *consul) call(t *testing.T, what string) (string, error) {
	t.Helper()
	conn, err := net.Dial("tcp4", netip.AddrPortFrom(c.addr(2, 1), rpcPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(conn, what)
	_ = conn.(*net.TCPConn).CloseWrite() //nolint:forcetypeassert // "tcp4" gives nothing else
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// A native server is told the type by the protocol and gets the rest.
func TestRPCToANativeServer(t *testing.T) {
	c := newConsul(t, func(*config.Sidecar) {})
	got := c.native(t)
	for what, want := range map[string]string{"\x04question": "consul/rpc-multi question", "\x05state": "consul/rpc-snapshot state"} {
		if answer, err := c.call(t, what); err != nil || answer != "answer" {
			t.Errorf("%q was answered %q, %v", what, answer, err)
		}
		if arrived := <-got; arrived != want {
			t.Errorf("%q arrived as %q, want %q", what, arrived, want)
		}
	}
	// TLS of the servers' own cannot be told to it, and the log says what helps.
	if _, err := c.call(t, "\x03hello"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("TLS inside: %v, want a reset", err)
	}
	last := c.alice.outbound.Peer(keyOf(certs.Identity{Datacenter: "dc2", Node: "bob"})).LastError
	if !strings.Contains(last, "set verify_outgoing = false") || !strings.Contains(last, "type byte 3") {
		t.Errorf("last error %q names no remedy", last)
	}
}

// dial is what a peer of alice's does, with a certificate.
func (c *consul) dial(t *testing.T, cert tls.Certificate, protos ...string) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp4", c.alice.Addr().String(), &tls.Config{
		Certificates: []tls.Certificate{cert}, NextProtos: protos, InsecureSkipVerify: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn
}

// served returns the next connection that the local server gets, and its first n
// bytes.
func (c *consul) served(t *testing.T, n int) (net.Conn, string) {
	t.Helper()
	_ = c.rpc.SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := c.rpc.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, n)
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	return conn, string(got)
}

// From a native server the type is put back.
func TestRPCOfANativeServer(t *testing.T) {
	c := newConsul(t, func(*config.Sidecar) {})
	bob := c.leaf(t, "dc2", "bob")
	for proto, first := range map[string]string{
		"consul/rpc-single": "\x00", "consul/rpc-multi": "\x04", "consul/rpc-snapshot": "\x05",
		"consul/rpc-gossip": "\x06", "consul/rpc-grpc": "\x08", "culvert/stream/1/rpc": "",
	} {
		conn := c.dial(t, bob, proto)
		_, _ = io.WriteString(conn, "\x04question")
		if _, got := c.served(t, len(first)+9); got != first+"\x04question" {
			t.Errorf("%s: the server got %q", proto, got)
		}
	}
	for _, proto := range []string{"consul/raft", "consul/raft-forwarding"} {
		if _, err := c.dial(t, bob, proto).Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "bad certificate") {
			t.Errorf("%s of another datacenter: %v, want a refusal", proto, err)
		}
	}
}

// A server that demands TLS gets it, with the sidecar's certificate.
func TestRPCToALocalServerWithTLS(t *testing.T) {
	c := newConsul(t, func(cfg *config.Sidecar) { cfg.Server.TLS = true })
	conn := c.dial(t, c.leaf(t, "dc2", "bob"), "consul/rpc-multi")
	_, _ = io.WriteString(conn, "question")
	raw, first := c.served(t, 1)
	if first != "\x03" {
		t.Fatalf("the server got type %q, want TLS", first)
	}
	inner := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{c.leaf(t, "dc1", "alice")}, ClientAuth: tls.RequireAnyClientCert})
	got := make([]byte, 9)
	if _, err := io.ReadFull(inner, got); err != nil || string(got) != "\x04question" {
		t.Errorf("inside the server got %q, %v", got, err)
	}
	if names := inner.ConnectionState().PeerCertificates[0].DNSNames; !strings.Contains(strings.Join(names, " "), "alice.server.dc1.consul") {
		t.Errorf("the certificate is of %q", names)
	}
	_ = inner.CloseWrite() // an end inside is an end outside
	if all, err := io.ReadAll(conn); err != nil || len(all) > 0 {
		t.Errorf("the peer read %q, %v, want an end", all, err)
	}
}

// Without a passthrough what is not TLS is closed and counted.
func TestNoPassthrough(t *testing.T) {
	c := newConsul(t, func(*config.Sidecar) {})
	conn, err := net.Dial("tcp4", c.alice.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(conn, "\x04plain")
	if got, _ := io.ReadAll(conn); len(got) > 0 {
		t.Errorf("answered %q", got)
	}
	eventually(t, func() error {
		families, err := c.registry.Gather()
		if err != nil {
			return err
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "culvert_mux_refused_total" && m.GetLabel()[0].GetValue() == "not_tls" && m.GetCounter().GetValue() == 1 {
					return nil
				}
			}
		}
		return errors.New("it was not counted as not_tls")
	})
}

// What is not the sidecar's goes to the server as it is: plain connections, and
// TLS too where that is asked for.
func TestPassthrough(t *testing.T) {
	for name, withTLS := range map[string]bool{"plain alone": false, "TLS too": true} {
		t.Run(name, func(t *testing.T) {
			c := newConsul(t, func(cfg *config.Sidecar) {
				cfg.Listen.Passthrough, cfg.Listen.PassthroughTLS = netip.AddrPortFrom(cfg.Server.Address, rpcPort).String(), withTLS
			})
			conn, err := net.Dial("tcp4", c.alice.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_, _ = io.WriteString(conn, "\x04plain")
			if _, got := c.served(t, 6); got != "\x04plain" {
				t.Errorf("the server got %q", got)
			}
			own := c.dial(t, c.leaf(t, "dc2", "bob"), "consul/rpc-multi") // is the sidecar's in any case
			_, _ = io.WriteString(own, "x")
			if _, got := c.served(t, 2); got != "\x04x" {
				t.Errorf("the server got %q", got)
			}
			for _, protos := range [][]string{nil, {"x/y"}} {
				if !withTLS {
					if _, err := tls.Dial("tcp4", c.alice.Addr().String(), &tls.Config{NextProtos: protos, InsecureSkipVerify: true}); err == nil {
						t.Errorf("TLS that offers %q was taken", protos)
					}
					continue
				}
				go func() {
					raw, err := c.rpc.Accept()
					if err != nil {
						return
					}
					inner := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{c.leaf(t, "dc3", "carol")}, NextProtos: protos})
					_, _ = io.WriteString(inner, "the server's own")
					_ = inner.Close()
				}()
				conn, err := tls.Dial("tcp4", c.alice.Addr().String(), &tls.Config{NextProtos: protos, InsecureSkipVerify: true})
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(conn)
				if err != nil || string(got) != "the server's own" || conn.ConnectionState().PeerCertificates[0].DNSNames[0] != "carol.server.dc3.consul" {
					t.Errorf("through the passthrough: %q, %v", got, err)
				}
				_ = conn.Close()
			}
		})
	}
}
