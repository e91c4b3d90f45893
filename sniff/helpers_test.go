package sniff

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

var errStop = errors.New("enough seen")

// recorder is a connection that keeps what is written and never answers.
type recorder struct {
	net.Conn
	wrote []byte
}

func (r *recorder) Write(b []byte) (int, error)   { r.wrote = append(r.wrote, b...); return len(b), nil }
func (*recorder) Read([]byte) (int, error)        { return 0, errStop }
func (*recorder) SetDeadline(time.Time) error     { return nil }
func (*recorder) Close() error                    { return nil }
func (*recorder) SetReadDeadline(time.Time) error { return nil }

// realHello is the ClientHello that crypto/tls sends.
func realHello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	var r recorder
	if err := tls.Client(&r, c).HandshakeContext(context.Background()); !errors.Is(err, errStop) {
		t.Fatalf("handshake: %v", err)
	}
	return r.wrote
}

// hellos are real ones: post-quantum, without name, with old versions, large.
func hellos(t testing.TB) [][]byte {
	t.Helper()
	var long []string
	for size := 0; size < 20<<10; size += 200 {
		long = append(long, strings.Repeat("p", 190)+string(rune('a'+size/200%26))+string(rune('a'+size/5200)))
	}
	var out [][]byte
	for _, c := range []*tls.Config{
		{ServerName: "bob.server.dc2.consul", NextProtos: []string{"culvert/packet/1/gossip-packet", "consul/wan-gossip/packet"}, MinVersion: tls.VersionTLS13},
		{InsecureSkipVerify: true},
		{ServerName: "example.org", MaxVersion: tls.VersionTLS12, CurvePreferences: []tls.CurveID{tls.X25519}},
		{ServerName: "alice.server.dc1.nomad", NextProtos: long},
	} {
		out = append(out, realHello(t, c))
	}
	return out
}

// message returns the handshake message that a stream of records carries.
func message(t testing.TB, hello []byte) []byte {
	t.Helper()
	var r reader
	if err := r.advance(hello); err != nil || !r.complete() {
		t.Fatalf("a hello of crypto/tls: %v", err)
	}
	return r.pending[:r.size]
}

// records cuts a message into records of n bytes.
func records(message []byte, n int) []byte {
	var out []byte
	for len(message) > 0 {
		k := min(n, len(message))
		out = append(out, typeHandshake, 3, 1, byte(k>>8), byte(k))
		out = append(out, message[:k]...)
		message = message[k:]
	}
	return out
}

// feeder is a connection that gives prepared bytes, n at a time, and counts
// what was taken.
type feeder struct {
	net.Conn
	data  []byte
	n     int
	taken int
	end   error
}

func (f *feeder) Read(p []byte) (int, error) {
	if len(f.data) == 0 {
		return 0, f.end
	}
	k := copy(p[:min(len(p), f.n)], f.data)
	f.data = f.data[k:]
	f.taken += k
	return k, nil
}

// endless claims whatever prefix says and then never ends.
type endless struct {
	net.Conn
	prefix, repeat []byte
	taken          int
}

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		if e.taken < len(e.prefix) {
			p[i] = e.prefix[e.taken]
		} else {
			p[i] = e.repeat[(e.taken-len(e.prefix))%len(e.repeat)]
		}
		e.taken++
	}
	return len(p), nil
}

// seenByTLS is what crypto/tls reads from a hello; ok is false if it refuses it.
func seenByTLS(b []byte) (name string, protocols []string, ok bool) {
	server := tls.Server(&feederConn{feeder{data: b, n: len(b), end: io.EOF}}, &tls.Config{
		GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
			name, protocols, ok = info.ServerName, info.SupportedProtos, true
			return nil, errStop
		},
	})
	_ = server.HandshakeContext(context.Background()) // it always fails; what it saw is what counts
	return name, protocols, ok
}

// feederConn is a feeder that takes answers and drops them.
type feederConn struct{ feeder }

func (*feederConn) Write(b []byte) (int, error)      { return len(b), nil }
func (*feederConn) Close() error                     { return nil }
func (*feederConn) SetWriteDeadline(time.Time) error { return nil }
func (*feederConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

// helloWith is a hello that has these extensions alone, in one record.
func helloWith(extensions []byte) []byte {
	body := append(make([]byte, 0, 64+len(extensions)), 3, 3)
	body = append(body, make([]byte, 32)...)
	body = append(body, 0, 0, 2, 0x13, 1, 1, 0, byte(len(extensions)>>8), byte(len(extensions)))
	body = append(body, extensions...)
	m := append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	return records(m, 1<<14)
}

// extension is one extension: its data behind its type and length.
func extension(kind byte, data ...byte) []byte {
	return append([]byte{0, kind, byte(len(data) >> 8), byte(len(data))}, data...)
}

// list is data behind its length.
func list(data ...byte) []byte { return append([]byte{byte(len(data) >> 8), byte(len(data))}, data...) }

// hostName is one name of a server name list.
func hostName(name string) []byte { return append([]byte{0}, list([]byte(name)...)...) }

// named is a hello for a server name, whatever that is.
func named(name string) []byte { return helloWith(extension(0, list(hostName(name)...)...)) }

// badNames are names that no server has.
func badNames() []string {
	return []string{
		"bob.consul.", ".", "bob\x00.consul", "bob consul", "bob\n.consul", "b\xc3\xb6b.consul", "bob\x7f",
		strings.Repeat("a", 254),
	}
}

// largestHello is a message of MaxHello bytes behind its header: one unknown
// extension fills it.
func largestHello() []byte {
	fill := MaxHello - 43 - 4
	b := helloWith(append([]byte{0xfa, 0xfa, byte(fill >> 8), byte(fill)}, make([]byte, fill)...))
	var m []byte
	for len(b) > 0 {
		n := recordHeader + int(b[3])<<8 + int(b[4])
		m = append(m, b[recordHeader:n]...)
		b = b[n:]
	}
	return m
}
