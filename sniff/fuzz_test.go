package sniff

import (
	"crypto/tls"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

// FuzzParseHello holds five properties:
//   - what crypto/tls accepts as a hello is accepted, with the same server name
//     and protocols (as far as it is made of handshake records, fits MaxPeek and
//     names a server in printable ASCII);
//   - how a hello is cut into segments changes nothing, and each proper prefix
//     is io.ErrUnexpectedEOF;
//   - what follows a hello changes nothing;
//   - what is beyond a bound is refused as that;
//   - a client that never stops sending gets a verdict within MaxPeek bytes.
//
// cut is the size of the segments, and record re-cuts the message into records
// of that size where it is one. With any bound taken out of the parser the seeds
// alone fail.
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
	for _, name := range badNames() {
		f.Add(named(name), uint16(100), uint16(0))
		seeds++
	}
	many := realHello(f, &tls.Config{ServerName: "bob.server.dc2.consul", NextProtos: slices.Repeat([]string{"p"}, 257), MinVersion: tls.VersionTLS13})
	f.Add(many, uint16(700), uint16(0))
	seeds++
	// The engine comes to a stop over seeds as large as these.
	for _, b := range large() {
		checkHello(f, b, 1459)
		seeds++
	}
	if seeds < 28 {
		f.Fatalf("only %d seeds", seeds)
	}
	f.Fuzz(func(t *testing.T, b []byte, cut, record uint16) {
		if record > 0 {
			var r reader
			if r.advance(b) == nil && r.complete() {
				b = records(r.pending[:r.size], int(record))
			}
		}
		checkHello(t, b, int(cut)+1)
	})
}

// large are hellos at the bounds and beyond them.
func large() [][]byte {
	m := largestHello()
	small := records(m[:18000], 1) // 105 KiB
	return [][]byte{
		records(m, 1<<14), records(m, 6), records(m, 5), records(m, 1),
		slices.Concat(small, records(m[18000:], 1<<14)), // MaxPeek is within a record
		slices.Concat(small, make([]byte, MaxPeek)),
	}
}

// checkHello holds the properties for b, cut into segments.
func checkHello(t testing.TB, b []byte, segment int) {
	t.Helper()
	h, n, err := ParseHello(b)
	checkBounds(t, b, err)
	checkAgainstTLS(t, b, h, err)
	got, connErr := NewConn(&feeder{data: slices.Clone(b), n: segment, end: io.EOF}, nil).Hello()
	if (err == nil) != (connErr == nil) {
		t.Fatalf("whole: %v, in segments of %d: %v", err, segment, connErr)
	}
	if err != nil {
		checkVerdict(t, b)
		return
	}
	if got.ServerName != h.ServerName || !slices.Equal(got.Protocols, h.Protocols) || got.Random != h.Random {
		t.Fatalf("whole: %+v, in segments of %d: %+v", h, segment, got)
	}
	for _, k := range []int{0, 1, 4, 5, 9, n / 2, n - 1} {
		if _, _, err := ParseHello(b[:k]); k < n && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("the first %d of %d bytes: %v", k, n, err)
		}
	}
	if again, m, err := ParseHello(append(slices.Clone(b[:n]), 22, 0, 0, 0)); err != nil || m != n || again.Random != h.Random {
		t.Fatalf("with other bytes behind: %d, %v; want %d", m, err, n)
	}
}

func checkAgainstTLS(t testing.TB, b []byte, h Hello, err error) {
	t.Helper()
	name, protocols, ok := seenByTLS(b)
	if !ok || !handshakeOnly(b) {
		return
	}
	if large := new(TooLargeError); errors.As(err, &large) && large.Limit == MaxPeek {
		if len(b) <= MaxPeek {
			t.Fatalf("all of %d bytes: %v", len(b), err)
		}
		return // crypto/tls takes any number of records
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r < 0x21 || r > 0x7e }) || len(name) > 253 {
		if !errors.Is(err, ErrMalformed) {
			t.Fatalf("server name %q: %v, want ErrMalformed", name, err)
		}
		return
	}
	if len(protocols) > 256 {
		if !errors.Is(err, ErrMalformed) {
			t.Fatalf("%d protocols: %v, want ErrMalformed", len(protocols), err)
		}
		return
	}
	if err != nil {
		t.Fatalf("crypto/tls accepts it (%q), not here: %v", name, err)
	}
	if h.ServerName != name || !slices.Equal(h.Protocols, protocols) {
		t.Fatalf("read %q %q, crypto/tls %q %q", h.ServerName, h.Protocols, name, protocols)
	}
}

// checkBounds holds err against the bounds on lengths, which it finds for itself
// in the headers of b.
func checkBounds(t testing.TB, b []byte, err error) {
	t.Helper()
	const hello, peek, record = 64 << 10, 128 << 10, 16 << 10
	var message []byte
	for at := 0; ; {
		if at+6 > peek {
			wantTooLarge(t, err, at+6, peek)
			return
		}
		if len(b) < at+5 || b[at] != 22 || b[at+1] >= 0x10 {
			return
		}
		n := int(b[at+3])<<8 | int(b[at+4])
		end := at + 5 + n
		if n == 0 || n > record {
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "record of") {
				t.Fatalf("a record of %d bytes: %v", n, err)
			}
			return
		}
		if end > peek {
			wantTooLarge(t, err, end, peek)
			return
		}
		message = append(message, b[at+5:min(len(b), end)]...)
		if len(message) >= 4 {
			size := int(message[1])<<16 | int(message[2])<<8 | int(message[3])
			if message[0] == 1 && size > hello {
				wantTooLarge(t, err, size, hello)
				return
			}
			if len(message) >= 4+size {
				return
			}
		}
		if len(message) > 0 && message[0] != 1 || len(b) < end {
			return
		}
		at = end
	}
}

func wantTooLarge(t testing.TB, err error, size, limit int) {
	t.Helper()
	if large := new(TooLargeError); !errors.As(err, &large) || large.Size != size || large.Limit != limit {
		t.Fatalf("a claim of %d bytes where the limit is %d: %v", size, limit, err)
	}
}

// checkVerdict sends b and then records of one byte for ever.
func checkVerdict(t testing.TB, b []byte) {
	t.Helper()
	conn := &endless{prefix: b, repeat: []byte{22, 3, 1, 0, 1, 0}}
	_, err := NewConn(conn, nil).Hello()
	if large := new(TooLargeError); err != nil && !errors.Is(err, ErrNotTLS) && !errors.Is(err, ErrMalformed) && !errors.As(err, &large) {
		t.Fatalf("a client that goes on and on gets no verdict: %v", err)
	}
	if conn.taken > MaxPeek {
		t.Fatalf("%d bytes were read", conn.taken)
	}
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
