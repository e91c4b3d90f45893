package test

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"culvert/internal/testpki"
	"culvert/test/lab"
)

// Frames as a native server writes them: a length of four bytes, big endian,
// and the packet. Written by hand from the format.
const nativeFrames = `
00 00 00 04  70 69 6e 67
00 00 00 01  00
00 00 00 0b  67 6f 73 73 69 70 20 67 6f 65 73
`

var nativePayloads = []string{"ping", "\x00", "gossip goes"}

const nativePackets = "consul/wan-gossip/packet"

// What a native server sends arrives, however it is cut.
func TestNativeFramesAreDelivered(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	bob := l.ca.Leaf(t, testpki.Server("dc2", "bob"))
	frames, err := hex.DecodeString(strings.Join(strings.Fields(nativeFrames), ""))
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(frames) { // 0 is every byte by itself
		c, err := l.dial(bob, nativePackets)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().NegotiatedProtocol; got != nativePackets {
			t.Fatalf("negotiated %q", got)
		}
		before, _, _ := l.sink.got()
		parts := [][]byte{frames[:cut], frames[cut:]}
		if cut == 0 {
			parts = nil
			for i := range frames {
				parts = append(parts, frames[i:i+1])
			}
		}
		for _, part := range parts { // each a TLS record of its own
			if _, err := c.Write(part); err != nil {
				t.Fatal(err)
			}
		}
		lab.Eventually(t, 5*time.Second, func() error {
			now, _, _ := l.sink.got()
			if len(now) != len(before)+len(nativePayloads) {
				return fmt.Errorf("cut at %d: the server got %d packets, want %d", cut, len(now)-len(before), len(nativePayloads))
			}
			for i, want := range nativePayloads {
				if got := now[len(before)+i]; got != (received{want, "127.77.2.1"}) {
					return fmt.Errorf("cut at %d: packet %d is %v, want %q", cut, i, got, want)
				}
			}
			return nil
		})
		_ = c.Close()
	}
}

// What is sent to a native server is one frame a TLS record, byte for byte.
func TestFramesForANativeServer(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	ln, err := l.others.Listen(lab.HostPort(l.others.Addr, bobPort))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()

	payloads := []string{"a", strings.Repeat("b", 1400), strings.Repeat("c", 16380), strings.Repeat("d", 40000)}
	records := make(chan []byte, 64)
	go func() { records <- nil; serveNative(t, l, ln, records) }()
	<-records
	bob := netip.AddrPortFrom(netip.MustParseAddr("127.77.2.1"), 7946)
	for _, p := range payloads {
		if _, err := l.sink.udp.WriteToUDPAddrPort([]byte(p), bob); err != nil {
			t.Fatal(err)
		}
	}
	var want [][]byte
	for _, p := range payloads {
		f := frame(p)
		for len(f) > 16384 { // a record holds no more (RFC 8446 section 5.1)
			want, f = append(want, f[:16384]), f[16384:]
		}
		want = append(want, f)
	}
	for i, w := range want {
		select {
		case got := <-records:
			if !bytes.Equal(got, w) {
				t.Fatalf("record %d has %d bytes (% x...), want %d (% x...)", i, len(got), got[:min(8, len(got))], len(w), w[:min(8, len(w))])
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("record %d did not come", i)
		}
	}
	select {
	case extra := <-records:
		t.Errorf("a record more: % x", extra)
	case <-time.After(200 * time.Millisecond):
	}
	lab.Eventually(t, 5*time.Second, func() error {
		for _, p := range l.sidecar.Status().Peers {
			if p.Node == "bob" && p.Path == "native" && p.State == "up" {
				return nil
			}
		}
		return fmt.Errorf("status: %+v", l.sidecar.Status().Peers)
	})
}

// serveNative accepts one connection as a native server does, and hands on each
// record that it reads.
func serveNative(t *testing.T, l *lone, ln net.Listener, records chan<- []byte) {
	raw, err := ln.Accept()
	if err != nil {
		return
	}
	defer func() { _ = raw.Close() }()
	cert := l.ca.Leaf(t, testpki.Server("dc2", "bob"))
	c := tls.Server(raw, &tls.Config{
		Certificates: []tls.Certificate{cert.TLS}, ClientCAs: l.ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{nativePackets}, MinVersion: tls.VersionTLS13,
	})
	buf := make([]byte, 1<<17)
	for {
		n, err := c.Read(buf) // one record at the most
		if err == io.EOF || err != nil {
			return
		}
		records <- bytes.Clone(buf[:n])
	}
}
