package test

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"culvert/internal/testpki"
	"culvert/test/lab"
)

// A sink stands in the place of a server: it keeps what comes by UDP and counts
// what comes by TCP.
type sink struct {
	udp *net.UDPConn

	mu      sync.Mutex
	packets []received
	streams int // connections
	bytes   int // of streams
}

type received struct {
	payload string
	from    string // address without port
}

func startSink(t *testing.T, h *lab.Host) *sink {
	t.Helper()
	s := &sink{}
	at := lab.HostPort(h.Addr, 7946)
	var err error
	if s.udp, err = h.ListenPacket(at); err != nil {
		t.Fatal(err)
	}
	ln, err := h.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := s.udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.packets = append(s.packets, received{string(buf[:n]), from.Addr().Unmap().String()})
			s.mu.Unlock()
		}
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.streams++
			s.mu.Unlock()
			wg.Go(func() {
				n, _ := io.Copy(io.Discard, c)
				_ = c.Close()
				s.mu.Lock()
				defer s.mu.Unlock()
				s.bytes += int(n)
			})
		}
	})
	t.Cleanup(func() {
		_ = s.udp.Close()
		_ = ln.Close()
		wg.Wait()
	})
	return s
}

// got returns what has come so far.
func (s *sink) got() (packets []received, streams, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]received{}, s.packets...), s.streams, s.bytes
}

// A lone is one sidecar with a sink for a server, and whoever the test plays
// around it: peers are on the gateway's host, which is on the same LAN.
type lone struct {
	t       *testing.T
	host    *lab.Host // alice's
	others  *lab.Host // where her peers are
	ca      *testpki.CA
	sink    *sink
	sidecar *lab.Daemon
	port    int // of the sidecar
}

const (
	aliceName = "alice.server.dc1.consul"
	bobPort   = 9443 // of bob's sidecar, on the others' host
)

func newLone(t *testing.T) *lone {
	t.Helper()
	n := lab.TwoSites(t, lab.Options{HostsA: 1})
	l := &lone{t: t, host: n.Sites[0].Hosts[0], others: n.Sites[0].Gateway, ca: testpki.New(t, "consul"), port: 8443}
	l.sink = startSink(t, l.host)
	files := t.TempDir()
	ca, cert, key := l.ca.WriteFiles(t, files, l.ca.Leaf(t, testpki.Server("dc1", "alice")))
	l.sidecar = l.host.StartCulvert("sidecar", fmt.Sprintf(`datacenter = "dc1"
node = "alice"
server {
  profile   = "serf"
  address   = %q
  advertise = "127.77.1.1"
}
listen { address = %q }
%s
peer "amy" {
  datacenter = "dc1"
  advertise  = "127.77.1.2"
  address    = %q
}
peer "bob" {
  datacenter = "dc2"
  advertise  = "127.77.2.1"
  address    = %q
}
datacenter "dc2" { mode = "direct" }
log {
  level  = "debug"
  format = "json"
}
`, l.host.Addr, lab.HostPort(l.host.Addr, 8443), lab.TLSBlock(ca, cert, key),
		lab.HostPort(l.others.Addr, 9444), lab.HostPort(l.others.Addr, bobPort)))
	return l
}

// dial connects to the sidecar as whoever has the certificate; nil has none.
func (l *lone) dial(cert *testpki.Cert, protocols ...string) (*tls.Conn, error) {
	raw, err := l.others.Dial("tcp", lab.HostPort(l.host.Addr, l.port))
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	c := tls.Client(raw, &tls.Config{
		ServerName: aliceName, RootCAs: l.ca.Pool(), NextProtos: protocols, MinVersion: tls.VersionTLS13,
		// Sent whatever the server asks for.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if cert == nil {
				return &tls.Certificate{}, nil
			}
			return &cert.TLS, nil
		},
	})
	if err := c.Handshake(); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

// frame is the wire form of one packet.
func frame(payload string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(payload))), payload...)
}

// sends sends packets as bob and waits until the sink has them.
func (l *lone) delivers(cert *testpki.Cert, payload, from string) {
	l.t.Helper()
	c, err := l.dial(cert, "culvert/packet/1/gossip-packet")
	if err != nil {
		l.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	before, _, _ := l.sink.got()
	if _, err := c.Write(frame(payload)); err != nil {
		l.t.Fatal(err)
	}
	lab.Eventually(l.t, 5*time.Second, func() error {
		now, _, _ := l.sink.got()
		if len(now) != len(before)+1 || now[len(now)-1] != (received{payload, from}) {
			return fmt.Errorf("the server got %v, want %q from %s", now[len(before):], payload, from)
		}
		return nil
	})
}
