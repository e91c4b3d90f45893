package sniff

import (
	"errors"
	"io"
	"slices"
	"testing"
)

// FuzzParseHello holds three properties:
//   - what crypto/tls accepts as a hello is accepted, with the same server name
//     and protocols (as far as it is made of handshake records and fits MaxPeek);
//   - how a hello is cut into segments changes nothing, and each proper prefix
//     is io.ErrUnexpectedEOF;
//   - what follows a hello changes nothing.
//
// cut is the size of the segments, and record re-cuts the message into records
// of that size where it is one.
func FuzzParseHello(f *testing.F) {
	seeds := 0
	for _, b := range hellos(f) {
		f.Add(b, uint16(1), uint16(0))
		f.Add(b, uint16(700), uint16(3))
		seeds += 2
	}
	for _, h := range hostile() {
		b := make([]byte, 1<<10)
		_, _ = h.conn.Read(b)
		f.Add(b, uint16(100), uint16(0))
		seeds++
	}
	if seeds < 13 {
		f.Fatalf("only %d seeds", seeds)
	}
	f.Fuzz(func(t *testing.T, b []byte, cut, record uint16) {
		if record > 0 {
			var r reader
			if r.advance(b) == nil && r.complete() {
				b = records(r.pending[:r.size], int(record))
			}
		}
		if len(b) >= MaxPeek {
			return
		}
		h, n, err := ParseHello(b)
		if name, protocols, ok := seenByTLS(b); ok && handshakeOnly(b) {
			if err != nil {
				t.Fatalf("crypto/tls accepts it (%q), not here: %v", name, err)
			}
			if h.ServerName != name || !slices.Equal(h.Protocols, protocols) {
				t.Fatalf("read %q %q, crypto/tls %q %q", h.ServerName, h.Protocols, name, protocols)
			}
		}
		conn := &feeder{data: slices.Clone(b), n: int(cut) + 1, end: io.EOF}
		got, connErr := NewConn(conn).Hello()
		if (err == nil) != (connErr == nil) {
			t.Fatalf("whole: %v, in segments of %d: %v", err, cut+1, connErr)
		}
		if err != nil {
			return
		}
		if got.ServerName != h.ServerName || !slices.Equal(got.Protocols, h.Protocols) || got.Random != h.Random {
			t.Fatalf("whole: %+v, in segments of %d: %+v", h, cut+1, got)
		}
		for _, k := range []int{0, 1, 4, 5, 9, n / 2, n - 1} {
			if _, _, err := ParseHello(b[:k]); k < n && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("the first %d of %d bytes: %v", k, n, err)
			}
		}
		if again, m, err := ParseHello(append(slices.Clone(b[:n]), 22, 0, 0, 0)); err != nil || m != n || again.Random != h.Random {
			t.Fatalf("with other bytes behind: %d, %v; want %d", m, err, n)
		}
	})
}

// handshakeOnly tells whether all records are of the handshake: crypto/tls
// lets a warning alert pass between, which no client sends.
func handshakeOnly(b []byte) bool {
	for len(b) >= recordHeader {
		if b[0] != typeHandshake {
			return false
		}
		n := recordHeader + int(b[3])<<8 + int(b[4])
		if n >= len(b) {
			return true
		}
		b = b[n:]
	}
	return true
}
