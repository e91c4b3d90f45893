package sniff

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"culvert/internal/memnet"
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
				c := NewConn(&feeder{data: cut, n: segment, end: io.EOF}, nil)
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
	if _, err := NewConn(&feeder{end: io.EOF}, nil).Hello(); err != io.EOF {
		t.Errorf("an end before the first byte: %v, want io.EOF", err)
	}
	if _, err := NewConn(&feeder{end: io.EOF}, nil).FirstByte(); err != io.EOF {
		t.Errorf("an end before the first byte: %v, want io.EOF", err)
	}
	if _, err := NewConn(&feeder{data: b[:100], n: 100, end: io.EOF}, nil).Hello(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an end within: %v, want io.ErrUnexpectedEOF", err)
	}
	// A read that fails once, as at a deadline, loses nothing.
	f := &feeder{data: b[:100], n: 100, end: errStop}
	c := NewConn(f, nil)
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
		"a record of 64 KiB":        {&endless{prefix: []byte{22, 3, 1, 0xff, 0xff, 1, 0, 1, 0}, repeat: []byte{0}}, firstRead},
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
		_, err := NewConn(h.conn, nil).Hello()
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
		if h.conn.taken > h.limit {
			t.Errorf("%s: %d bytes were read before it was refused (%v), want at most %d", name, h.conn.taken, err, h.limit)
		}
	}
	if _, err := NewConn(&endless{prefix: []byte{22, 3, 1, 0x40, 0, 1, 1, 0, 1}, repeat: []byte{0}}, nil).Hello(); err == nil {
		t.Error("a message over the limit was accepted")
	} else if large := new(TooLargeError); !errors.As(err, &large) || large.Size != MaxHello+1 || large.Limit != MaxHello {
		t.Errorf("a message over the limit: %v", err)
	}
}

func TestLargestHello(t *testing.T) {
	m := largestHello()
	if len(m) != messageHeader+MaxHello {
		t.Fatalf("the message has %d bytes", len(m))
	}
	for _, size := range []int{1 << 14, 6} {
		if _, _, err := ParseHello(records(m, size)); err != nil {
			t.Errorf("a hello of %d bytes in records of %d: %v", MaxHello, size, err)
		}
	}
	// In smaller records it is too much, given at once or byte by byte.
	for _, size := range []int{5, 1} {
		cut := records(m, size)
		_, _, whole := ParseHello(cut)
		_, bySegment := NewConn(&feeder{data: cut, n: 1, end: io.EOF}, nil).Hello()
		for _, err := range []error{whole, bySegment} {
			if large := new(TooLargeError); !errors.As(err, &large) || large.Limit != MaxPeek {
				t.Errorf("a hello of %d bytes in records of %d: %v", MaxHello, size, err)
			}
		}
	}
}

// numbered is empty extensions of so many types.
func numbered(from, to byte) (all []byte) {
	for kind := from; kind < to; kind++ {
		all = append(all, extension(kind)...)
	}
	return all
}

func TestExtensions(t *testing.T) {
	name := extension(extServerName, list(hostName("bob.consul")...)...)
	protocol := extension(extALPN, list(2, 'h', '2')...)
	for what, c := range map[string]struct {
		extensions []byte
		want       *Hello // nil: malformed
	}{
		"none":                     {nil, &Hello{}},
		"both":                     {slices.Concat(name, protocol), &Hello{ServerName: "bob.consul", Protocols: []string{"h2"}}},
		"upper case is kept":       {extension(extServerName, list(hostName("Bob.Consul")...)...), &Hello{ServerName: "Bob.Consul"}},
		"a name of another type":   {extension(extServerName, list(append([]byte{7, 0, 1, 0}, hostName("bob")...)...)...), &Hello{ServerName: "bob"}},
		"a name twice":             {slices.Concat(name, name), nil},
		"an unknown one twice":     {slices.Concat(extension(99), extension(99)), nil},
		"40 and the last twice":    {slices.Concat(numbered(100, 140), extension(139)), nil},
		"40 and the first twice":   {slices.Concat(numbered(100, 140), extension(100)), nil},
		"40":                       {numbered(100, 140), &Hello{}},
		"two names":                {extension(extServerName, list(slices.Concat(hostName("bob"), hostName("eve"))...)...), nil},
		"no name":                  {extension(extServerName, list()...), nil},
		"an empty name":            {extension(extServerName, list(hostName("")...)...), nil},
		"bytes after the names":    {extension(extServerName, append(list(hostName("bob")...), 0)...), nil},
		"no protocol":              {extension(extALPN, list()...), nil},
		"an empty protocol":        {extension(extALPN, list(2, 'h', '2', 0)...), nil},
		"a protocol cut short":     {extension(extALPN, list(3, 'h', '2')...), nil},
		"bytes after protocols":    {extension(extALPN, append(list(2, 'h', '2'), 0)...), nil},
		"256 protocols":            {extension(extALPN, list(slices.Repeat([]byte{1, 'p'}, 256)...)...), &Hello{Protocols: slices.Repeat([]string{"p"}, 256)}},
		"257 protocols":            {extension(extALPN, list(slices.Repeat([]byte{1, 'p'}, 257)...)...), nil},
		"an extension cut short":   {[]byte{0, 99, 0, 1}, nil},
		"half an extension's type": {[]byte{0}, nil},
	} {
		h, _, err := ParseHello(helloWith(c.extensions))
		switch {
		case c.want == nil:
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s: %v, want ErrMalformed", what, err)
			}
		case err != nil || h.ServerName != c.want.ServerName || !slices.Equal(h.Protocols, c.want.Protocols):
			t.Errorf("%s: %+v, %v", what, h, err)
		}
	}
	for _, bad := range badNames() {
		if _, _, err := ParseHello(named(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("server name %q: %v, want ErrMalformed", bad, err)
		}
	}
	longest := strings.Repeat("a", 253)
	if h, _, err := ParseHello(named(longest)); err != nil || h.ServerName != longest {
		t.Errorf("a server name of 253 bytes: %v", err)
	}
}

// A hello was looked for, given up and read instead: nothing is left to look at.
func TestLookAfterRead(t *testing.T) {
	b := records(message(t, hellos(t)[0]), 100)
	f := &feeder{data: b[:300], n: 300, end: errStop}
	c := NewConn(f, nil)
	if _, err := c.Hello(); !errors.Is(err, errStop) {
		t.Fatalf("a failed read: %v", err)
	}
	if n, err := c.Read(make([]byte, 400)); n != 300 || err != nil {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	f.data = b[300:]
	if _, err := c.Hello(); !errors.Is(err, errBegun) {
		t.Errorf("Hello after Read: %v", err)
	}
	if _, err := c.FirstByte(); !errors.Is(err, errBegun) {
		t.Errorf("FirstByte after Read: %v", err)
	}
}

// A hello that drips, a byte a second, does not outlast the deadline, and
// nothing of it is lost.
func TestSlowHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := hellos(t)[0]
		client, server := memnet.Pipe()
		dripped := make(chan struct{})
		go func() {
			defer close(dripped)
			for i := range b {
				if _, err := client.Write(b[i : i+1]); err != nil {
					return
				}
				<-time.After(time.Second)
			}
		}()
		c := NewConn(server, nil)
		began := time.Now()
		_ = c.SetReadDeadline(began.Add(10*time.Second + time.Millisecond))
		if _, err := c.Hello(); !errors.Is(err, os.ErrDeadlineExceeded) || len(c.Buffered()) != 11 {
			t.Errorf("after %v: %v with %d bytes, want the deadline with 11", time.Since(began), err, len(c.Buffered()))
		}
		_ = c.SetReadDeadline(time.Time{})
		if h, err := c.Hello(); err != nil || h.ServerName != "bob.server.dc2.consul" {
			t.Errorf("without a deadline: %v, %q", err, h.ServerName)
		}
		_ = c.Close()
		<-dripped
	})
}

// The memory of unfinished hellos is bounded for all connections together, small
// ones need none of it, and what was taken is given back.
func TestBudget(t *testing.T) {
	const size = 60 << 10
	half := records(largestHello(), 1<<14)[:size]
	budget := NewBudget(4 * 2 * MaxPeek)
	var held []*Conn
	for {
		c := NewConn(&feeder{data: slices.Clone(half), n: 1460, end: errStop}, budget)
		_, err := c.Hello()
		if errors.Is(err, ErrBusy) {
			c.Release()
			break
		}
		if !errors.Is(err, errStop) {
			t.Fatal(err)
		}
		if held = append(held, c); len(held) > 100 {
			t.Fatal("100 large hellos at once were taken")
		}
	}
	if len(held) < 4 {
		t.Errorf("%d large hellos fitted into the budget, want 4 at least", len(held))
	}
	if _, err := NewConn(&feeder{data: slices.Clone(hellos(t)[0]), n: 100, end: io.EOF}, budget).Hello(); err != nil {
		t.Errorf("a usual hello while large ones fill the budget: %v", err)
	}
	for _, c := range held {
		c.Release()
		c.Release()
	}
	if left := budget.left.Load(); left != 4*2*MaxPeek {
		t.Errorf("%d bytes left after all were released, want all %d", left, 4*2*MaxPeek)
	}
}

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		err    error
		reason string
		alert  byte
	}{
		{os.ErrDeadlineExceeded, "hello_timeout", 0},
		{fmt.Errorf("x: %w", &TooLargeError{}), "hello_too_large", 50},
		{fmt.Errorf("x: %w", ErrMalformed), "hello_malformed", 50},
		{ErrNotTLS, "hello_malformed", 50},
		{ErrBusy, "hello_busy", 80},
		{io.ErrUnexpectedEOF, "hello_truncated", 0},
		{syscall.ECONNRESET, "hello_truncated", 0},
		{fmt.Errorf("x: %w", net.ErrClosed), "", 0},
	} {
		reason, alert := Verdict(c.err)
		if reason != c.reason || alert != c.alert {
			t.Errorf("%v: %q and alert %d, want %q and %d", c.err, reason, alert, c.reason, c.alert)
		}
		if c.reason != "" && !slices.Contains(Reasons(), reason) {
			t.Errorf("%q is not among the reasons", reason)
		}
	}
}

func TestDetach(t *testing.T) {
	b := hellos(t)[0]
	f := &feeder{data: append(slices.Clone(b), "more"...), n: 64, end: io.EOF}
	c := NewConn(f, nil)
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
