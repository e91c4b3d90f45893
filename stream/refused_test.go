package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

func load(t *testing.T, ca *testpki.CA, cert *testpki.Cert) *certs.Source {
	t.Helper()
	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), cert)
	s, err := certs.Load(certs.Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// refusing returns a DialPeer whose handshakes succeed and whose peer refuses
// the certificate afterwards: only servers may dial one.
func refusing(t *testing.T) DialPeer {
	t.Helper()
	ca := testpki.New(t, "consul")
	table, err := alpn.NewTable([]alpn.Service{{Name: "rpc", Kind: alpn.KindStream}})
	if err != nil {
		t.Fatal(err)
	}
	none := alpn.HandlerFunc(func(_ context.Context, c *alpn.Conn) {
		t.Error("the peer took the connection")
		c.Abort()
	})
	bobs, err := alpn.NewServer(table, load(t, ca, ca.Leaf(t, testpki.Server("dc2", "bob"))), alpn.ServerOptions{Packet: none, Stream: none})
	if err != nil {
		t.Fatal(err)
	}
	d := alpn.NewDialer(table, load(t, ca, ca.Leaf(t, testpki.Gateway("dc1", "gw"))), alpn.DialerOptions{})
	return func(ctx context.Context, _ catalog.Key, want Wanted) (Reached, error) {
		raw, accepted := testtcp.Pair(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			bobs.ServeConn(t.Context(), sniff.NewConn(accepted, nil), func(bool) bool { return true })
		}()
		t.Cleanup(func() { _ = accepted.Close(); <-done })
		c, err := d.Dial(ctx, raw, "bob.server.dc2.consul", want.Service)
		return Reached{Conn: c}, err
	}
}

// In TLS 1.3 a dialler learns of its refusal when it reads, while the stream
// seems to be established.
func TestOutboundRefusedByThePeersTLS(t *testing.T) {
	for name, question := range map[string]int{"silent": 0, "small": 100, "large": 8 << 20} {
		t.Run(name, func(t *testing.T) {
			core, logs := observer.New(zapcore.WarnLevel)
			m := NewMetrics(nil, "rpc")
			o := NewOutbound(refusing(t), OutboundOptions{Metrics: m, Log: zap.New(core)})
			server, captured := testtcp.Pair(t)
			go func() { _, _ = server.Write(make([]byte, question)) }()
			within(t, "Stream", func() { o.Stream(t.Context(), bob, "rpc", captured) })
			if _, err := server.Read(make([]byte, 1)); err == nil {
				t.Error("the server read something")
			}
			if s := o.Peer(bob); !strings.Contains(s.LastError, "bad certificate") || s.Open != 0 {
				t.Errorf("stats %+v, want the alert", s)
			}
			if n := testutil.ToFloat64(m.failures.WithLabelValues("out")); n != 1 {
				t.Errorf("%v failures counted, want 1", n)
			}
			if logs.Len() != 1 || logs.All()[0].Message != "peer refused" {
				t.Errorf("logged %v, want one warning", logs.All())
			}
		})
	}
}

// A refusedError is an alert as package alpn makes it.
type refusedError struct{ error }

func (refusedError) Refused() bool { return true }

type alerting struct {
	*net.TCPConn
	first string
}

func (c *alerting) Read(p []byte) (int, error) {
	if n := copy(p, c.first); n > 0 {
		c.first = c.first[n:]
		return n, nil
	}
	return 0, refusedError{errors.New("internal error")}
}

// An alert in the midst of a stream is an end, and one from a dialler is no
// matter of reaching anybody.
func TestOtherAlertsAreNoFailures(t *testing.T) {
	t.Run("after data", func(t *testing.T) {
		_, captured := testtcp.Pair(t)
		_, far := testtcp.Pair(t)
		o := NewOutbound(reaching(&alerting{far, "data"}), OutboundOptions{})
		within(t, "Stream", func() { o.Stream(t.Context(), bob, "rpc", captured) })
		if s := o.Peer(bob); s.LastError != "" || s.Total != 1 || s.BytesReceived != 4 {
			t.Errorf("stats %+v", s)
		}
	})
	t.Run("inbound", func(t *testing.T) {
		_, accepted := testtcp.Pair(t)
		server, dialled := testtcp.Pair(t)
		i := NewInbound(func(context.Context, catalog.Key, string) (*net.TCPConn, error) { return dialled, nil }, InboundOptions{})
		within(t, "ServeConn", func() { i.ServeConn(t.Context(), bob, "rpc", Untyped, &alerting{accepted, ""}) })
		if _, err := io.ReadAll(server); err == nil {
			t.Error("the server saw a clean end")
		}
		if s := i.Peer(bob); s.LastError != "" || s.Total != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}
