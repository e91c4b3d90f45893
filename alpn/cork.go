package alpn

import (
	"io"
	"sync"
)

const (
	// maxPlaintext is how much one record carries, in bytes: RFC 8446 section 5.1.
	maxPlaintext = 16 << 10
	// corkSize holds the records of as much as a copy loop writes at once.
	corkSize = 4 * (recordHeader + maxCiphertext)
)

//nolint:gochecknoglobals // buffers are of use to every connection of the process
var corkBuffers = sync.Pool{New: func() any { return new([corkSize]byte) }}

// A cork holds records back while a write of several is under way, so that they go
// out together: crypto/tls makes a system call for each, and the kernel wakes the
// reader as often.
type cork struct {
	mu     sync.Mutex // crypto/tls answers by itself what another goroutine reads
	on     bool
	buf    *[corkSize]byte // nil: nothing is held back
	n      int             // bytes in buf
	failed error           // of a write: a part of a record may be out
}

// write writes p to w, or holds it back.
func (c *cork) write(w io.Writer, p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.failed != nil:
		return 0, c.failed
	case !c.on:
		return w.Write(p)
	}
	if c.n+len(p) > corkSize {
		if err := c.flush(w); err != nil {
			return 0, err
		}
	}
	if len(p) > corkSize {
		return w.Write(p)
	}
	if c.buf == nil {
		c.buf = corkBuffers.Get().(*[corkSize]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	}
	c.n += copy(c.buf[c.n:], p)
	return len(p), nil
}

func (c *cork) insert() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = true
}

// pull lets out what is held back.
func (c *cork) pull(w io.Writer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = false
	return c.flush(w)
}

// flush writes what is held back. After an error nothing more is written, for the
// peer could not tell where a record begins. Called with mu held.
func (c *cork) flush(w io.Writer) error {
	if c.buf == nil {
		return c.failed
	}
	_, err := w.Write(c.buf[:c.n])
	corkBuffers.Put(c.buf)
	c.buf, c.n, c.failed = nil, 0, err
	return err
}
