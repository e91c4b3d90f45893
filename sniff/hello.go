// Package sniff looks at how a connection begins without taking anything from
// it: the first byte, and the facts of a TLS ClientHello.
//
//	c := sniff.NewConn(raw, nil)
//	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
//	first, err := c.FirstByte()
//	...
//	hello, err := c.Hello()
//	...
//	raw, peeked := c.Detach() // send peeked on first, then all that raw reads
//
// What is read comes from strangers. A hello may be cut across TCP segments and
// across TLS records, as post-quantum ones always are, and memory stays within
// [MaxPeek] whatever lengths are claimed. The parser accepts what crypto/tls
// accepts and reads the same from it, but for server names that are none and for
// lists of more than [MaxProtocols]; a fuzz test holds the two side by side.
//
// The package sets no deadlines: its callers do. A [Conn] is for one goroutine.
package sniff

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

const (
	// MaxHello is the largest ClientHello that is accepted, in bytes without
	// its header: what crypto/tls accepts too.
	MaxHello = 64 << 10
	// MaxPeek is how many bytes of a connection are kept at most while its
	// hello is read. A record adds five bytes to what it carries: this is
	// enough for a hello of MaxHello in records of six bytes or more, and for
	// one of 20 KiB in records of one byte.
	MaxPeek = 128 << 10
	// MaxProtocols is how many protocols a hello may name. Each costs more
	// memory here than it does on the wire.
	MaxProtocols = 256
)

// The record and message types of RFC 8446, section 5.1 and section 4.
const (
	typeHandshake    = 22
	typeClientHello  = 1
	recordHeader     = 5
	messageHeader    = 4
	maxRecordPayload = 1 << 14
)

var (
	// ErrNotTLS is the beginning of something that is no TLS handshake.
	ErrNotTLS = errors.New("not a TLS handshake")
	// ErrMalformed is a TLS handshake that begins with no valid ClientHello.
	ErrMalformed = errors.New("malformed client hello")
)

// A TooLargeError is a hello that is, or claims to be, larger than is accepted.
type TooLargeError struct {
	Size, Limit int // bytes
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("client hello of %d bytes or more: at most %d", e.Size, e.Limit)
}

// A Hello is what a ClientHello says to whom it may concern on the way.
type Hello struct {
	// ServerName is as sent (RFC 6066 section 3); "" where there is none. It
	// is printable ASCII of at most 253 bytes without a dot at its end, and
	// no more than that is known of it.
	ServerName string
	Protocols  []string // in the client's order (RFC 7301 section 3.1)
	Random     [32]byte
}

// ParseHello reads the hello at the beginning of a TLS byte stream. The count is
// how long the records are that carry it. For a proper prefix of a hello the
// error is [io.ErrUnexpectedEOF].
func ParseHello(b []byte) (Hello, int, error) {
	var r reader
	if err := r.advance(b); err != nil {
		return Hello{}, 0, err
	}
	if !r.complete() {
		return Hello{}, 0, io.ErrUnexpectedEOF
	}
	hello, err := parseMessage(r.message())
	if err != nil {
		return Hello{}, 0, err
	}
	return hello, r.next, nil
}

// A reader collects a handshake message out of records. It is shown the same
// bytes again and again as they grow, and looks at each once.
type reader struct {
	next    int    // where the next record begins
	pending []byte // the message so far, from whole records
	size    int    // of the whole message with its header; 0 until that is there
}

func (r *reader) complete() bool { return r.size > 0 && len(r.pending) >= r.size }

func (r *reader) message() []byte { return r.pending[messageHeader:r.size] }

// advance takes the whole records of b that it has not taken yet. What is wrong
// is told as soon as it can be seen.
func (r *reader) advance(b []byte) error {
	for !r.complete() {
		if err := r.room(1); err != nil {
			return err
		}
		rest := b[r.next:]
		if len(rest) > 0 && rest[0] != typeHandshake {
			return r.foreign()
		}
		if len(rest) < recordHeader {
			return nil
		}
		if rest[1] >= 0x10 { // as crypto/tls: a version that never was
			return r.foreign()
		}
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if n == 0 || n > maxRecordPayload {
			return fmt.Errorf("%w: record of %d bytes", ErrMalformed, n)
		}
		if err := r.room(n); err != nil {
			return err
		}
		payload := rest[recordHeader:]
		whole := len(payload) >= n
		if whole {
			payload = payload[:n]
		}
		if err := r.readHeader(payload); err != nil {
			return err
		}
		if !whole {
			return nil
		}
		r.take(payload)
	}
	return nil
}

// take adds a record's payload. A message in one record is not copied.
func (r *reader) take(payload []byte) {
	if r.pending == nil {
		r.pending = slices.Clip(payload)
	} else {
		r.pending = append(r.pending, payload...)
	}
	r.next += recordHeader + len(payload)
}

// readHeader looks at the message's header, of which payload is the next part.
func (r *reader) readHeader(payload []byte) error {
	if r.size > 0 {
		return nil
	}
	var header [messageHeader]byte
	n := copy(header[:], r.pending)
	n += copy(header[n:], payload)
	if n > 0 && header[0] != typeClientHello {
		return fmt.Errorf("%w: handshake message of type %d", ErrMalformed, header[0])
	}
	if n < messageHeader {
		return nil
	}
	size := int(header[1])<<16 | int(header[2])<<8 | int(header[3])
	if size > MaxHello {
		return &TooLargeError{Size: size, Limit: MaxHello}
	}
	r.size = messageHeader + size
	return nil
}

// foreign is a record that is no part of a handshake.
func (r *reader) foreign() error {
	if r.next == 0 {
		return ErrNotTLS
	}
	return fmt.Errorf("%w: another record within", ErrMalformed)
}

// room refuses a next record of n bytes that would end beyond MaxPeek. It goes
// by where the record is and not by how much has come, so that how a hello is
// cut into segments changes nothing.
func (r *reader) room(n int) error {
	if end := r.next + recordHeader + n; end > MaxPeek {
		return &TooLargeError{Size: end, Limit: MaxPeek}
	}
	return nil
}

// The extensions that matter here.
const (
	extServerName = 0
	extALPN       = 16
)

// parseMessage reads the body of a ClientHello (RFC 8446 section 4.1.2). It may
// accept what crypto/tls does not, in parts that it does not read.
func parseMessage(b []byte) (Hello, error) {
	var h Hello
	s := cursor(b)
	if !s.skip(2) || !s.read(h.Random[:]) {
		return Hello{}, fmt.Errorf("%w: cut short", ErrMalformed)
	}
	_, session := s.vector8()
	suites, ok := s.vector16()
	_, compression := s.vector8()
	if !session || !ok || !compression || len(suites)%2 != 0 {
		return Hello{}, fmt.Errorf("%w: bad session, suites or compression", ErrMalformed)
	}
	if len(s) == 0 {
		return h, nil // no extensions: TLS 1.2 at most
	}
	extensions, ok := s.vector16()
	if !ok || len(s) != 0 {
		return Hello{}, fmt.Errorf("%w: bad extensions", ErrMalformed)
	}
	if err := h.readExtensions(extensions); err != nil {
		return Hello{}, err
	}
	return h, nil
}

func (h *Hello) readExtensions(s cursor) error {
	var seen kinds
	for len(s) > 0 {
		var id [2]byte
		if !s.read(id[:]) {
			return fmt.Errorf("%w: extension cut short", ErrMalformed)
		}
		data, ok := s.vector16()
		kind := binary.BigEndian.Uint16(id[:])
		if !ok || !seen.add(kind) {
			return fmt.Errorf("%w: extension %d cut short or sent twice", ErrMalformed, kind)
		}
		switch kind {
		case extServerName:
			ok = h.readServerName(data)
		case extALPN:
			ok = h.readProtocols(data)
		}
		if !ok {
			return fmt.Errorf("%w: bad extension %d", ErrMalformed, kind)
		}
	}
	return nil
}

// kinds is a set of extensions. Real hellos have some fifteen.
type kinds struct {
	few  [24]uint16
	n    int
	many map[uint16]bool // of those after the few
}

// add reports whether the kind was not there.
func (k *kinds) add(kind uint16) bool {
	if slices.Contains(k.few[:k.n], kind) || k.many[kind] {
		return false
	}
	if k.n < len(k.few) {
		k.few[k.n] = kind
		k.n++
		return true
	}
	if k.many == nil {
		k.many = make(map[uint16]bool)
	}
	k.many[kind] = true
	return true
}

// readServerName takes the one host_name of RFC 6066 section 3.
func (h *Hello) readServerName(s cursor) bool {
	const hostName = 0
	names, ok := s.vector16()
	if !ok || len(names) == 0 || len(s) != 0 {
		return false
	}
	for len(names) > 0 {
		var kind [1]byte
		if !names.read(kind[:]) {
			return false
		}
		name, ok := names.vector16()
		if !ok || len(name) == 0 {
			return false
		}
		if kind[0] != hostName {
			continue
		}
		if h.ServerName != "" || !isName(name) {
			return false
		}
		h.ServerName = string(name)
	}
	return true
}

// maxName is the length of the longest name in DNS as text (RFC 1035 section
// 2.3.4).
const maxName = 253

// isName is stricter than crypto/tls, which only wants no dot at the end: names
// are compared and logged before anyone has authenticated.
func isName(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return len(b) <= maxName && b[len(b)-1] != '.'
}

func (h *Hello) readProtocols(s cursor) bool {
	list, ok := s.vector16()
	if !ok || len(list) == 0 || len(s) != 0 {
		return false
	}
	for len(list) > 0 {
		name, ok := list.vector8()
		if !ok || len(name) == 0 || len(h.Protocols) == MaxProtocols {
			return false
		}
		h.Protocols = append(h.Protocols, string(name))
	}
	return true
}

// A cursor is what is left to read.
type cursor []byte

func (s *cursor) skip(n int) bool {
	if len(*s) < n {
		return false
	}
	*s = (*s)[n:]
	return true
}

func (s *cursor) read(to []byte) bool {
	n := copy(to, *s)
	return n == len(to) && s.skip(n)
}

// vector8 and vector16 read a vector with a length of one or two bytes.
func (s *cursor) vector8() (cursor, bool) {
	var n [1]byte
	if !s.read(n[:]) {
		return nil, false
	}
	return s.take(int(n[0]))
}

func (s *cursor) vector16() (cursor, bool) {
	var n [2]byte
	if !s.read(n[:]) {
		return nil, false
	}
	return s.take(int(binary.BigEndian.Uint16(n[:])))
}

func (s *cursor) take(n int) (cursor, bool) {
	if len(*s) < n {
		return nil, false
	}
	v := (*s)[:n]
	*s = (*s)[n:]
	return v, true
}
