package test

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"culvert/internal/testpki"
	"culvert/test/lab"
)

const timeRE = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`

// A badPeer is one that must deliver nothing.
type badPeer struct {
	name   string
	cert   *testpki.Cert
	reason string
	wanted string // regular expressions, whole
	found  string
}

func badPeers(t *testing.T, ca *testpki.CA) []badPeer {
	other := testpki.New(t, "consul")
	bob := testpki.Server("dc2", "bob")
	names := "names bob.server.dc2.consul, server.dc2.consul, localhost"
	issued := func(by *testpki.CA) string {
		return fmt.Sprintf(`issued by "%s" (key id %s)`, by.Cert.Subject, strings.ReplaceAll(fmt.Sprintf("% x", by.Cert.SubjectKeyId), " ", ":"))
	}
	const scheme = "a name like <node>.server.<dc>.consul"
	q := regexp.QuoteMeta
	return []badPeer{
		{"a certificate of another CA, sent unasked", other.Leaf(t, bob), "cert_other_ca", q(issued(ca)), q(issued(other) + ", " + names)},
		{"expired", ca.Leaf(t, bob, testpki.NotAfter(time.Now().Add(-time.Minute))), "cert_expired", "valid at " + timeRE, "expired " + timeRE + q(", "+names)},
		{"not yet valid", ca.Leaf(t, bob, testpki.NotBefore(time.Now().Add(time.Hour))), "cert_not_yet_valid", "valid at " + timeRE, "not valid before " + timeRE + q(", "+names)},
		{"another domain", ca.Leaf(t, testpki.Names("bob.server.dc2.nomad")), "cert_other_domain", q(scheme), q("names bob.server.dc2.nomad")},
		{"no use as a client", ca.Leaf(t, bob, testpki.Usages(x509.ExtKeyUsageServerAuth)), "cert_key_usage", q("extended key usage clientAuth"), q("extended key usage serverAuth, " + names)},
		{"client role", ca.Leaf(t, testpki.Client("dc2")), "cert_role", q("role server"), q("role client, names client.dc2.consul, localhost")},
		{"gateway role", ca.Leaf(t, testpki.Gateway("dc2", "gw1")), "cert_role", q("role server"), q("role gateway, names gw1.gateway.dc2.consul, gateway.dc2.consul, localhost")},
		{"no names", ca.Leaf(t, testpki.NoNames()), "cert_no_names", q(scheme), q("no names")},
		{"two roles", ca.Leaf(t, testpki.Names("server.dc2.consul", "gateway.dc2.consul")), "cert_conflicting_names", q("the names of one node, in one datacenter and one role"), q("names server.dc2.consul, gateway.dc2.consul")},
		{"no certificate", nil, "cert_no_certificate", q("a certificate " + issued(ca)), q("no certificate")},
	}
}

// A bad peer delivers not one byte, is told of in one line with what was wanted
// and what was found, and is counted exactly; a good one delivers before and
// after it.
func TestBadPeers(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	bob := l.ca.Leaf(t, testpki.Server("dc2", "bob"))
	for _, bad := range badPeers(t, l.ca) {
		l.delivers(bob, "before "+bad.name, "127.77.2.1")
		packets, streams, bytes := l.sink.got()
		counted := l.refused(bad.reason)
		const tries = 3
		for range tries {
			for protocol, send := range map[string][]byte{
				"culvert/packet/1/gossip-packet": frame("bad"), "culvert/stream/1/gossip-stream": []byte("bad"),
			} {
				l.attempt(bad.cert, protocol, send)
			}
		}
		lab.Eventually(t, 5*time.Second, func() error {
			if n := l.refused(bad.reason) - counted; n != 2*tries {
				return fmt.Errorf("%s: counted %v times as %s, want %d", bad.name, n, bad.reason, 2*tries)
			}
			return nil
		})
		l.delivers(bob, "after "+bad.name, "127.77.2.1")
		nowPackets, nowStreams, nowBytes := l.sink.got()
		if len(nowPackets) != len(packets)+1 || nowStreams != streams || nowBytes != bytes {
			t.Errorf("%s: the server got %v and %d streams with %d bytes", bad.name, nowPackets[len(packets):], nowStreams-streams, nowBytes-bytes)
		}
		l.warned(bad)
	}
}

func (l *lone) refused(reason string) float64 {
	l.t.Helper()
	return l.sidecar.Metrics().Sum("culvert_mux_refused_total", "reason", reason)
}

// attempt does all that a bad peer can: it ignores that it is not wanted.
func (l *lone) attempt(cert *testpki.Cert, protocol string, send []byte) {
	c, err := l.dial(cert, protocol)
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	_, _ = c.Write(send)
	_, _ = io.ReadAll(c)
}

// warned checks that there is one warning of a bad peer, and its words.
func (l *lone) warned(bad badPeer) {
	l.t.Helper()
	var lines []map[string]any
	for line := range strings.Lines(l.sidecar.Output()) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) != nil || fields["level"] != "warn" || fields["reason"] != bad.reason {
			continue
		}
		if found, _ := fields["found"].(string); matches(bad.found, found) {
			lines = append(lines, fields)
		}
	}
	if len(lines) != 1 {
		l.t.Errorf("%s: %d warnings with %s and found %s, want 1", bad.name, len(lines), bad.reason, bad.found)
		return
	}
	if wanted, _ := lines[0]["wanted"].(string); !matches(bad.wanted, wanted) {
		l.t.Errorf("%s: wanted %q, want %s", bad.name, wanted, bad.wanted)
	}
}

func matches(expression, s string) bool {
	return regexp.MustCompile(`^(?:` + expression + `)$`).MatchString(s)
}

// Packets of a verified server that has no address here are dropped and
// counted one by one; its streams are taken.
func TestPeersWithoutAnAddress(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	for _, peer := range []struct {
		name          string
		cert          *testpki.Cert
		reason        string
		wanted, found string
	}{
		{"a node that the catalog does not know", l.ca.Leaf(t, testpki.Server("dc3", "eve")), "unknown_peer", "a peer of the catalog", "dc3/eve"},
		{"a certificate that names no node", l.ca.Leaf(t, testpki.Names("server.dc2.consul")), "no_node", "a certificate that names a node", regexp.QuoteMeta("dc2/*")},
		{"a wildcard", l.ca.Leaf(t, testpki.Names("*.server.dc4.consul")), "no_node", "a certificate that names a node", regexp.QuoteMeta("dc4/*")},
	} {
		l.delivers(l.ca.Leaf(t, testpki.Server("dc2", "bob")), "before "+peer.name, "127.77.2.1")
		before, _, _ := l.sink.got()
		drops := func() float64 {
			return l.sidecar.Metrics().Sum("culvert_packet_drops_total", "direction", "in", "reason", peer.reason)
		}
		counted := drops()
		c, err := l.dial(peer.cert, "culvert/packet/1/gossip-packet")
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			if _, err := c.Write(frame("from nowhere")); err != nil {
				t.Fatal(err)
			}
		}
		lab.Eventually(t, 5*time.Second, func() error {
			if n := drops() - counted; n != 5 {
				return fmt.Errorf("%s: %v packets counted as %s, want 5", peer.name, n, peer.reason)
			}
			return nil
		})
		_ = c.Close()
		_, streams, _ := l.sink.got()
		s, err := l.dial(peer.cert, "culvert/stream/1/gossip-stream")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(s, "a stream")
		lab.Eventually(t, 5*time.Second, func() error {
			if _, now, _ := l.sink.got(); now != streams+1 {
				return fmt.Errorf("%s: its stream was not taken", peer.name)
			}
			return nil
		})
		_ = s.Close()
		if after, _, _ := l.sink.got(); len(after) != len(before) {
			t.Errorf("%s: the server got %v", peer.name, after[len(before):])
		}
		l.warned(badPeer{name: peer.name, reason: peer.reason, wanted: peer.wanted, found: peer.found})
		l.delivers(l.ca.Leaf(t, testpki.Server("dc2", "bob")), "after "+peer.name, "127.77.2.1")
	}
}

// What is inside a packet decides nothing: a peer that claims to be another is
// heard as itself.
func TestPacketsComeFromTheirSendersAddress(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	// memberlist's ping: type 0 and msgpack {SeqNo, Node, SourceAddr, SourceNode},
	// naming dc2's bob as its source.
	ping := "\x00\x84\xa5SeqNo\x01\xa4Node\xa5alice\xaaSourceAddr\xc4\x04\x7f\x4d\x02\x01\xaaSourceNode\xa3bob"
	l.delivers(l.ca.Leaf(t, testpki.Server("dc1", "amy")), ping, "127.77.1.2")
	packets, _, _ := l.sink.got()
	if len(packets) != 1 {
		t.Errorf("the server got %v, want one packet", packets)
	}
}

// Strangers of every kind end at once, or in bounded time, and are counted.
func TestStrangers(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	l := newLone(t)
	bob := l.ca.Leaf(t, testpki.Server("dc2", "bob"))
	raw := func(send string) []byte {
		c, err := l.others.Dial("tcp", lab.HostPort(l.host.Addr, 8443))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(15 * time.Second))
		_, _ = io.WriteString(c, send)
		if send == "" {
			return nil // a port scanner
		}
		got, err := io.ReadAll(c)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Errorf("%q was kept waiting", send[:min(len(send), 10)])
		}
		return got
	}
	for _, stranger := range []struct {
		name, reason string
		do           func() []byte
		answer       string
	}{
		{"plain HTTP", "not_tls", func() []byte { return raw("GET / HTTP/1.1\r\nHost: x\r\n\r\n") }, ""},
		{"a port scanner", "closed_early", func() []byte { return raw("") }, ""},
		{"half a hello that never ends", "hello_timeout", func() []byte { return raw("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03") }, ""},
		{"a hello of 16 MiB", "hello_too_large", func() []byte { return raw("\x16\x03\x01\x40\x00\x01\xff\xff\xff" + strings.Repeat("x", 100)) }, "\x15\x03\x03\x00\x02\x02\x32"},
		{"no ALPN", "no_alpn", func() []byte { _, _ = l.dial(bob); return nil }, ""},
		{"an unknown ALPN", "unknown_alpn", func() []byte { _, _ = l.dial(bob, "http/1.1", "h2"); return nil }, ""},
	} {
		before := l.refused(stranger.reason)
		if got := string(stranger.do()); got != stranger.answer {
			t.Errorf("%s was answered % x, want % x", stranger.name, got, stranger.answer)
		}
		lab.Eventually(t, 15*time.Second, func() error {
			if n := l.refused(stranger.reason) - before; n != 1 {
				return fmt.Errorf("%s: counted %v times as %s, want once", stranger.name, n, stranger.reason)
			}
			return nil
		})
	}
	// A large hello in one-byte segments is no stranger.
	l.delivers(bob, "still there", "127.77.2.1")
}
