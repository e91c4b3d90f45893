// Package testtcp makes real TCP connections on the loopback interface, for
// tests of what only they have: half-close, reset, splice, socket options.
package testtcp

import (
	"net"
	"testing"
	"time"
)

// Timeout is the deadline of both ends, unless a test sets another.
const Timeout = 20 * time.Second

// Pair returns the two ends of a connection, closed when the test ends at the
// latest.
func Pair(t testing.TB) (dialled, accepted *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	d, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		_ = d.Close()
		t.Fatal(err)
	}
	for _, c := range []net.Conn{d, a} {
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(Timeout))
	}
	dialled, _ = d.(*net.TCPConn)
	accepted, _ = a.(*net.TCPConn) // "tcp4" gives nothing else
	return dialled, accepted
}
