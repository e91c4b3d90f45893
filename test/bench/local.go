package main

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// What a connection asks of the local server, in its first nine bytes: a letter,
// and how many bytes.
const (
	askEcho = 'e' // what comes goes back
	askTake = 't' // takes so many, and answers with one
	askGive = 'g' // gives so many
	askLen  = 9
)

func ask(letter byte, n int64) []byte {
	b := binary.BigEndian.AppendUint64([]byte{letter}, uint64(n))
	return b[:askLen]
}

const chunk = 128 << 10

//nolint:gochecknoglobals // of use to all connections of the load
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// A local is the server behind the proxies.
type local struct {
	ln   net.Listener
	open func(net.Conn) (net.Conn, error) // what comes before the first byte asked
	wg   sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // nil when closed
}

func newLocal(open func(net.Conn) (net.Conn, error)) (*local, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &local{ln: ln, open: open, conns: make(map[net.Conn]struct{})}
	l.wg.Go(l.accept)
	return l, nil
}

// plain is for proxies that terminate TLS.
func plain(c net.Conn) (net.Conn, error) { return c, nil }

// afterHello is for those that pass TLS on: the hello is the client's, and what
// follows it is not TLS, so that the load generator's ciphers take no time.
func afterHello(c net.Conn) (net.Conn, error) {
	var header [5]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return nil, err
	}
	_, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint16(header[3:])))
	return c, err
}

// secured is for connections that are TLS from end to end.
func secured(config *tls.Config) func(net.Conn) (net.Conn, error) {
	return func(c net.Conn) (net.Conn, error) {
		t := tls.Server(c, config)
		return t, t.Handshake()
	}
}

func (l *local) address() string { return l.ln.Addr().String() }

func (l *local) accept() {
	for {
		c, err := l.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		l.mu.Lock()
		if l.conns != nil {
			l.conns[c] = struct{}{}
			l.wg.Go(func() { l.serve(c) })
		} else {
			_ = c.Close()
		}
		l.mu.Unlock()
	}
}

func (l *local) serve(c net.Conn) {
	defer func() {
		_ = c.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, c)
	}()
	opened, err := l.open(c)
	if err != nil {
		return
	}
	_ = answer(opened) // the client notices
	_ = opened.Close()
}

// answer does what a connection asks for.
func answer(c net.Conn) error {
	var asked [askLen]byte
	if _, err := io.ReadFull(c, asked[:]); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint64(asked[1:]))
	switch asked[0] {
	case askEcho:
		return echo(c)
	case askTake:
		if err := take(c, n); err != nil {
			return err
		}
		_, err := c.Write([]byte{1})
		return err
	case askGive:
		return give(c, n)
	}
	return fmt.Errorf("asked for %q", asked[0])
}

// echo answers in small pieces: a thousand of these wait at once.
func echo(c net.Conn) error {
	r := bufio.NewReaderSize(c, 16)
	for {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		if _, err := c.Write([]byte{b}); err != nil {
			return err
		}
	}
}

func take(c io.Reader, n int64) error {
	buf := chunks.Get().(*[chunk]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	defer chunks.Put(buf)
	for n > 0 {
		k, err := c.Read(buf[:min(n, chunk)])
		n -= int64(k)
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}

func give(c io.Writer, n int64) error {
	buf := chunks.Get().(*[chunk]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
	defer chunks.Put(buf)
	for n > 0 {
		k, err := c.Write(buf[:min(n, chunk)])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

func (l *local) close() {
	_ = l.ln.Close()
	l.mu.Lock()
	for c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
	l.mu.Unlock()
	l.wg.Wait()
}
