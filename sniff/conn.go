package sniff

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// firstRead is how much is read at once to begin with, in bytes: a whole hello
// with a post-quantum key share, as a rule.
const firstRead = 2 << 10

//nolint:gochecknoglobals // buffers are of use to every connection of the process
var firstBuffers = sync.Pool{New: func() any { return new([firstRead]byte) }}

// Recycle takes back what [Conn.Detach] returned, once nobody reads it any more.
func Recycle(peeked []byte) {
	if cap(peeked) == firstRead {
		firstBuffers.Put((*[firstRead]byte)(peeked[:firstRead]))
	}
}

// freeHello is how large a buffer may grow without asking the budget, in bytes:
// hellos that real clients send, but for very long lists, are smaller.
const freeHello = 4 << 10

// ErrBusy is a large hello at a time when too many others are being read.
var ErrBusy = errors.New("too many large client hellos at once")

// A Budget bounds the memory that many connections take together while their
// large hellos are read. It is for any number of goroutines.
type Budget struct{ left atomic.Int64 }

// NewBudget returns a budget of so many bytes.
func NewBudget(bytes int64) *Budget {
	b := &Budget{}
	b.left.Store(bytes)
	return b
}

func (b *Budget) take(n int) bool {
	if b.left.Add(-int64(n)) >= 0 {
		return true
	}
	b.left.Add(int64(n))
	return false
}

// A Conn is a connection whose beginning can be looked at before it is read. It
// is a [net.Conn] that gives what was looked at first.
type Conn struct {
	net.Conn
	buf    []byte // looked at and not read
	begun  bool   // something has been read: buf is not the beginning any more
	reader reader
	hello  *Hello // once complete

	budget  *Budget
	charged int // bytes taken from budget
}

// errBegun is a mistake of the caller's.
var errBegun = errors.New("look at a connection that has been read from")

// NewConn wraps a connection from which nothing has been read. The Conn owns c.
// What a large hello takes comes out of the budget until [Conn.Release]; nil
// means no bound but [MaxPeek].
func NewConn(c net.Conn, budget *Budget) *Conn { return &Conn{Conn: c, budget: budget} }

// Release gives back what was taken from the budget: the connection is about to
// end, or what was looked at about to be read. It may be called again.
func (c *Conn) Release() {
	if c.charged > 0 {
		c.budget.left.Add(int64(c.charged))
		c.charged = 0
	}
}

// FirstByte waits for the first byte and returns it. The error is the
// connection's, [io.EOF] if it ended without one. There is no looking back after
// Read: that is an error, as it is for [Conn.Hello].
func (c *Conn) FirstByte() (byte, error) {
	if c.begun {
		return 0, errBegun
	}
	if len(c.buf) == 0 {
		if err := c.peekMore(); err != nil {
			return 0, err
		}
	}
	return c.buf[0], nil
}

// Hello waits for the whole ClientHello and returns what it says. It may be
// called again, also after a deadline has passed. An end before the first byte
// is [io.EOF], one within the hello [io.ErrUnexpectedEOF]; without memory left
// for a large hello it is [ErrBusy].
func (c *Conn) Hello() (Hello, error) {
	if c.hello != nil {
		return *c.hello, nil
	}
	if c.begun {
		return Hello{}, errBegun
	}
	for {
		if err := c.reader.advance(c.buf); err != nil {
			return Hello{}, err
		}
		if c.reader.complete() {
			break
		}
		if err := c.peekMore(); err != nil {
			if errors.Is(err, io.EOF) && len(c.buf) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return Hello{}, err
		}
	}
	hello, err := parseMessage(c.reader.message())
	if err != nil {
		return Hello{}, err
	}
	c.reader = reader{}
	c.hello = &hello
	return hello, nil
}

// peekMore reads once. The buffer grows by what has come, never by what a
// length in it claims. The reader has its verdict before MaxPeek bytes are there.
func (c *Conn) peekMore() error {
	if len(c.buf) == cap(c.buf) {
		size := min(max(2*cap(c.buf), firstRead), MaxPeek)
		if !c.charge(size) {
			return ErrBusy
		}
		if c.buf == nil {
			c.buf = firstBuffers.Get().(*[firstRead]byte)[:0] //nolint:errcheck,forcetypeassert // the pool holds nothing else
		} else {
			grown := make([]byte, len(c.buf), size)
			copy(grown, c.buf)
			c.buf = grown
		}
	}
	n, err := c.Conn.Read(c.buf[len(c.buf):cap(c.buf)])
	c.buf = c.buf[:len(c.buf)+n]
	if n > 0 {
		return nil // an error comes again at the next read
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// charge takes a buffer of size bytes from the budget, and as much again for
// the message that is put together from its records.
func (c *Conn) charge(size int) bool {
	if c.budget == nil || size <= freeHello {
		return true
	}
	more := 2*size - c.charged
	if !c.budget.take(more) {
		return false
	}
	c.charged += more
	return true
}

// HasHello reports whether Hello would return without reading.
func (c *Conn) HasHello() bool {
	return c.hello != nil || !c.begun && (c.reader.advance(c.buf) != nil || c.reader.complete())
}

// Buffered returns what was looked at and not read yet. It is valid until the
// next call.
func (c *Conn) Buffered() []byte { return c.buf }

// Detach returns the connection itself and what was looked at, which comes
// before all that it reads from now on. The Conn is of no more use.
func (c *Conn) Detach() (net.Conn, []byte) {
	raw, peeked := c.Conn, c.buf
	c.Conn, c.buf, c.hello = nil, nil, nil
	return raw, peeked
}

// Read gives what was looked at, and then reads on.
func (c *Conn) Read(p []byte) (int, error) {
	c.begun = true
	if len(c.buf) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.buf)
	if c.buf = c.buf[n:]; len(c.buf) == 0 {
		c.buf = nil
	}
	return n, nil
}

// CloseWrite half-closes the connection, or closes it where it cannot be
// half-closed.
func (c *Conn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// Abort closes the connection so that its peer sees a reset, where it can.
func (c *Conn) Abort() {
	switch raw := c.Conn.(type) {
	case interface{ Abort() }:
		raw.Abort()
		return
	case interface{ SetLinger(sec int) error }:
		_ = raw.SetLinger(0) // fails on a closed connection alone
	}
	_ = c.Close()
}
