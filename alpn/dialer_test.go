package alpn

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/certs"
	"culvert/internal/alert"
	"culvert/internal/memnet"
	"culvert/internal/testpki"
	"culvert/internal/testtcp"
	"culvert/sniff"
)

func contextWithCancel(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(t.Context())
}

func sniffConn(c net.Conn) *sniff.Conn { return sniff.NewConn(c, nil) }

// wantClosed asserts that Dial gave up its raw connection.
func wantClosed(t *testing.T, raw net.Conn) {
	t.Helper()
	if err := raw.SetDeadline(time.Now()); err == nil {
		t.Error("the raw connection is still open")
	}
}

// An acceptor that knows only the native name gets that.
func TestDialNative(t *testing.T) {
	s := newSite(t)
	native := &Table{protocols: []string{"consul/wan-gossip/packet"}, routes: s.table.routes, offers: s.table.offers}
	s.accept = newAcceptor(t, native, s.accept.creds)
	c, _ := s.connectTCP(t, "gossip-packet")
	want := Route{Protocol: "consul/wan-gossip/packet", Service: "gossip-packet", Kind: KindPacket, Native: true}
	if c.Route() != want || c.Coalesce() {
		t.Errorf("route %+v, coalesce %v, want %+v", c.Route(), c.Coalesce(), want)
	}
}

func TestDialWrongServer(t *testing.T) {
	s := newSite(t)
	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	_, err := s.dialer.Dial(t.Context(), client, "carol.server.dc1.consul", "rpc")
	var peer *certs.PeerError
	if !errors.As(err, &peer) {
		t.Fatalf("Dial: %v, want a *certs.PeerError", err)
	}
	if peer.Reason != "name_mismatch" || !strings.Contains(peer.Wanted, "carol.server.dc1.consul") || !strings.Contains(peer.Found, aliceName) {
		t.Errorf("Dial: %+v, want both names", peer)
	}
	wantClosed(t, client)
	if count(s.dialed.dialError) != 1 || count(s.dialed.dialOK) != 0 {
		t.Error("the failed dial was not counted once")
	}
}

func TestDialServerOfAnotherCA(t *testing.T) {
	s := newSite(t)
	other := testpki.New(t, "consul")
	d := NewDialer(s.table, load(t, other, other.Leaf(t, testpki.Server("dc2", "bob"))), DialerOptions{})
	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	_, err := d.Dial(t.Context(), client, aliceName, "rpc")
	var peer *certs.PeerError
	if !errors.As(err, &peer) || peer.Reason != "other_ca" {
		t.Errorf("Dial: %v, want other_ca", err)
	}
	wantClosed(t, client)
}

// A refused dialler believes itself connected until it reads.
func TestRefusalComesFromRead(t *testing.T) {
	s := newSite(t)
	d := NewDialer(s.table, load(t, s.ca, s.ca.Leaf(t, testpki.Gateway("dc2", "gw"))), DialerOptions{})
	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	c, err := d.Dial(t.Context(), client, aliceName, "rpc")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	_, err = c.Read(make([]byte, 1))
	if !errors.As(err, new(*RefusedError)) || !strings.Contains(err.Error(), "bad certificate") {
		t.Errorf("Read: %v, want the alert", err)
	}
}

func TestDialNoCommonProtocol(t *testing.T) {
	s := newSite(t)
	table := mustTable(t, []Service{{Name: "other", Kind: KindStream}})
	d := NewDialer(table, s.dialer.creds, DialerOptions{})
	client, server := testtcp.Pair(t)
	s.accept.serve(t, server)
	_, err := d.Dial(t.Context(), client, aliceName, "other")
	var why *RefusedError
	if !errors.As(err, &why) || why.Alert != alert.NoApplicationProtocol || !strings.Contains(err.Error(), "no application protocol") {
		t.Errorf("Dial: %v, want the alert", err)
	}
	s.accept.wantRefused(t, reasonUnknownALPN)
}

// Who has refused is told by the alert: a gateway has no other reasons than these.
func TestWhoHasRefused(t *testing.T) {
	s := newSite(t)
	for description, answered := range map[byte]bool{
		alert.UnrecognizedName: false, alert.InternalError: false,
		alert.NoApplicationProtocol: true, alert.DecodeError: true,
	} {
		client, server := testtcp.Pair(t)
		done := make(chan struct{})
		go func() { defer close(done); alert.Refuse(server, description) }()
		_, err := s.dialer.Dial(t.Context(), client, aliceName, "rpc")
		var why *RefusedError
		if !errors.As(err, &why) || why.Alert != description || why.Answered() != answered {
			t.Errorf("alert %d: %#v, want answered %v", description, why, answered)
		}
		<-done
	}
	if (&RefusedError{Err: errors.New("of another kind")}).Answered() {
		t.Error("an alert that is not known says that the far side has answered")
	}
}

func TestDialUnknownService(t *testing.T) {
	s := newSite(t)
	client, server := testtcp.Pair(t)
	if _, err := s.dialer.Dial(t.Context(), client, aliceName, "nothing"); err == nil || !strings.Contains(err.Error(), "no such service") {
		t.Errorf("Dial: %v", err)
	}
	wantClosed(t, client)
	if n, err := server.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the far side read %d bytes, %v", n, err)
	}
}

func TestDialTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		client, server := memnet.Pipe()
		defer server.Close()
		start := time.Now()
		_, err := s.dialer.Dial(t.Context(), client, aliceName, "rpc")
		if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial to a silent server: %v", err)
		}
		if d := time.Since(start); d != HandshakeTimeout {
			t.Errorf("Dial gave up after %v", d)
		}
		wantClosed(t, client)
	})
}

func TestDialCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		client, server := memnet.Pipe()
		defer server.Close()
		ctx, cancel := contextWithCancel(t)
		time.AfterFunc(time.Second, cancel)
		start := time.Now()
		if _, err := s.dialer.Dial(ctx, client, aliceName, "rpc"); !errors.Is(err, context.Canceled) {
			t.Errorf("Dial: %v", err)
		}
		if d := time.Since(start); d != time.Second {
			t.Errorf("Dial went on for %v", d)
		}
		wantClosed(t, client)
	})
}
