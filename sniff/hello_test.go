package sniff

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

func TestRealHellos(t *testing.T) {
	for i, b := range hellos(t) {
		name, protocols, ok := seenByTLS(b)
		if !ok {
			t.Fatalf("hello %d: crypto/tls refuses its own", i)
		}
		h, n, err := ParseHello(append(slices.Clone(b), "what follows"...))
		if err != nil || n != len(b) {
			t.Fatalf("hello %d of %d bytes: %d, %v", i, len(b), n, err)
		}
		if h.ServerName != name || !slices.Equal(h.Protocols, protocols) {
			t.Errorf("hello %d: read %q %d protocols, crypto/tls %q %d", i, h.ServerName, len(h.Protocols), name, len(protocols))
		}
		if m := message(t, b); !bytes.Equal(h.Random[:], m[6:38]) {
			t.Errorf("hello %d: random %x", i, h.Random)
		}
	}
}

// The same hello is read however it is cut, into segments and into records.
func TestCutting(t *testing.T) {
	for i, b := range hellos(t) {
		want, _, err := ParseHello(b)
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{1, 2, 3, 100, 1 << 14} {
			cut := records(message(t, b), size)
			for _, segment := range []int{1, 7, 1460, len(cut)} {
				c := NewConn(&feeder{data: cut, n: segment, end: io.EOF})
				got, err := c.Hello()
				if err != nil || got.ServerName != want.ServerName || !slices.Equal(got.Protocols, want.Protocols) || got.Random != want.Random {
					t.Fatalf("hello %d in records of %d and segments of %d: %v, %q", i, size, segment, err, got.ServerName)
				}
				if !bytes.HasPrefix(cut, c.Buffered()) {
					t.Fatalf("hello %d: what was looked at is not what was sent", i)
				}
				if rest, err := io.ReadAll(c); err != nil || !bytes.Equal(rest, cut) {
					t.Fatalf("hello %d: read %d bytes after the look, %v; want all %d", i, len(rest), err, len(cut))
				}
			}
		}
	}
}

func TestEveryPrefixIsUnexpectedEOF(t *testing.T) {
	for i, b := range hellos(t)[:3] {
		for _, cut := range [][]byte{b, records(message(t, b), 40)} {
			for n := range len(cut) {
				if _, _, err := ParseHello(cut[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("hello %d, %d of %d bytes: %v", i, n, len(cut), err)
				}
			}
		}
	}
}

func TestEnds(t *testing.T) {
	b := hellos(t)[0]
	if _, err := NewConn(&feeder{end: io.EOF}).Hello(); err != io.EOF { //nolint:errorlint // exactly io.EOF
		t.Errorf("an end before the first byte: %v, want io.EOF", err)
	}
	if _, err := NewConn(&feeder{end: io.EOF}).FirstByte(); err != io.EOF { //nolint:errorlint // exactly io.EOF
		t.Errorf("an end before the first byte: %v, want io.EOF", err)
	}
	if _, err := NewConn(&feeder{data: b[:100], n: 100, end: io.EOF}).Hello(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an end within: %v, want io.ErrUnexpectedEOF", err)
	}
	// A read that fails once, as at a deadline, loses nothing.
	f := &feeder{data: b[:100], n: 100, end: errStop}
	c := NewConn(f)
	if _, err := c.Hello(); !errors.Is(err, errStop) {
		t.Errorf("a failed read: %v", err)
	}
	f.data, f.n = b[100:], len(b)
	if h, err := c.Hello(); err != nil || h.ServerName != "bob.server.dc2.consul" {
		t.Errorf("after a failed read: %v, %q", err, h.ServerName)
	}
}

func TestRefused(t *testing.T) {
	good := message(t, hellos(t)[0])
	change := func(f func(m []byte) []byte) []byte { return records(f(slices.Clone(good)), 1<<14) }
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"plain HTTP":              {[]byte("GET / HTTP/1.1\r\n\r\n"), ErrNotTLS},
		"an alert":                {[]byte{21, 3, 3, 0, 2, 1, 0}, ErrNotTLS},
		"a version of its own":    {[]byte{22, 0x16, 3, 0, 2, 1, 0}, ErrNotTLS},
		"an empty record":         {[]byte{22, 3, 1, 0, 0}, ErrMalformed},
		"a record that is large":  {[]byte{22, 3, 1, 0x40, 1}, ErrMalformed},
		"a server hello":          {records([]byte{2, 0, 0, 1, 0}, 10), ErrMalformed},
		"another record within":   {append(records(good[:50], 50), 23, 3, 3, 0, 1, 0), ErrMalformed},
		"an empty record within":  {append(records(good[:50], 50), 22, 3, 3, 0, 0), ErrMalformed},
		"a session that is short": {change(func(m []byte) []byte { m[38] = 255; return m[:60:60] }), nil},
		"bytes after extensions":  {change(func(m []byte) []byte { m[3]++; return append(m, 0) }), ErrMalformed},
	} {
		_, _, err := ParseHello(c.b)
		if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

// hostile are hellos that claim more than they may, or never end. Each says
// how much may be read before it is refused.
func hostile() map[string]hostileHello {
	return map[string]hostileHello{
		"a message of 16 MiB":       {&endless{prefix: []byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, repeat: []byte{0}}, firstRead},
		"a message of 64 KiB and 1": {&endless{prefix: []byte{22, 3, 1, 0x40, 0, 1, 1, 0, 1}, repeat: []byte{0}}, firstRead},
		"records of one byte":       {&endless{prefix: []byte{22, 3, 1, 0, 4, 1, 1, 0, 0}, repeat: []byte{22, 3, 1, 0, 1, 0}}, MaxPeek},
		"a record of 64 KiB":        {&endless{prefix: []byte{22, 3, 1, 0xff, 0xff}, repeat: []byte{0}}, firstRead},
		"records without a byte":    {&endless{prefix: nil, repeat: []byte{22, 3, 1, 0, 0}}, firstRead},
	}
}

type hostileHello struct {
	conn  *endless
	limit int // bytes
}

func TestHostileHellosAreBounded(t *testing.T) {
	if len(hostile()) < 5 {
		t.Fatal("the hostile hellos are missing")
	}
	for name, h := range hostile() {
		_, err := NewConn(h.conn).Hello()
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
		if h.conn.taken > h.limit {
			t.Errorf("%s: %d bytes were read before it was refused (%v), want at most %d", name, h.conn.taken, err, h.limit)
		}
	}
	if _, err := NewConn(&endless{prefix: []byte{22, 3, 1, 0x40, 0, 1, 1, 0, 1}, repeat: []byte{0}}).Hello(); err == nil {
		t.Error("a message over the limit was accepted")
	} else if large := new(TooLargeError); !errors.As(err, &large) || large.Size != MaxHello+1 || large.Limit != MaxHello {
		t.Errorf("a message over the limit: %v", err)
	}
}

func TestLargestHello(t *testing.T) {
	body := make([]byte, MaxHello)
	body[0], body[1] = 3, 3
	// Session, one suite, one compression, and one unknown extension fills up.
	at := 34
	body[at] = 0
	copy(body[at+1:], []byte{0, 2, 0x13, 1, 1, 0})
	at += 7
	fill := len(body) - at - 2
	copy(body[at:], []byte{byte(fill >> 8), byte(fill), 0xfa, 0xfa, byte((fill - 4) >> 8), byte(fill - 4)})
	m := append([]byte{1, 1, 0, 0}, body...)
	for _, size := range []int{1 << 14, 6} {
		if _, _, err := ParseHello(records(m, size)); err != nil {
			t.Errorf("a hello of %d bytes in records of %d: %v", MaxHello, size, err)
		}
	}
}

func TestDetach(t *testing.T) {
	b := hellos(t)[0]
	f := &feeder{data: append(slices.Clone(b), "more"...), n: 64, end: io.EOF}
	c := NewConn(f)
	if first, err := c.FirstByte(); err != nil || first != 22 {
		t.Fatalf("first byte %d, %v", first, err)
	}
	if _, err := c.Hello(); err != nil {
		t.Fatal(err)
	}
	raw, peeked := c.Detach()
	rest, err := io.ReadAll(raw)
	if err != nil || !bytes.Equal(append(slices.Clone(peeked), rest...), append(slices.Clone(b), "more"...)) {
		t.Errorf("%d bytes looked at and %d left, %v", len(peeked), len(rest), err)
	}
}
