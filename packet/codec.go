package packet

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

const (
	// HeaderLen is the length of a frame's header in bytes: the payload's length, uint32, big-endian.
	HeaderLen = 4
	// MaxPayload is the largest payload that is carried, in bytes: what one UDP datagram over IPv4 can hold
	// (65535 less the IP and UDP headers). A longer frame could not be delivered, so it is skipped and counted.
	MaxPayload = 65507
	// MaxFrame is the longest frame that is skipped, in bytes of payload: Consul's own limit. A connection that
	// announces more has lost its framing, or means harm, and is closed.
	MaxFrame = 4 << 20

	// readBuffer holds the usual gossip packet (1,400 bytes) whole. It is small because an idle connection keeps
	// it; a longer frame takes a buffer of its own.
	readBuffer = 4 << 10
)

// FrameTooLargeError reports a frame announced with more than [MaxFrame] bytes. The connection cannot go on.
type FrameTooLargeError struct {
	Size  int64 // announced, bytes
	Limit int64 // [MaxFrame]
}

// Error implements error.
func (e *FrameTooLargeError) Error() string {
	return fmt.Sprintf("frame of %d bytes is over the limit of %d", e.Size, e.Limit)
}

// AppendFrame appends one frame with this payload to dst and returns the result. A payload must not be longer
// than [MaxPayload]: receivers drop what is. An empty payload makes a keepalive frame.
func AppendFrame(dst, payload []byte) []byte {
	dst = slices.Grow(dst, HeaderLen+len(payload))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(payload))) //nolint:gosec // bounded by MaxPayload, see above
	return append(dst, payload...)
}

// Reader reads frames from a connection. It is the connection's only reader for its whole life, and is for one
// goroutine.
type Reader struct {
	br      *bufio.Reader
	held    int    // bytes of the last frame that still lie in br
	large   []byte // for frames that br cannot hold; at most MaxPayload bytes
	skipped uint64
	err     error
}

// NewReader returns a Reader of the frames in r.
func NewReader(r io.Reader) *Reader { return newReaderSize(r, readBuffer) }

func newReaderSize(r io.Reader, size int) *Reader {
	return &Reader{br: bufio.NewReaderSize(r, size)}
}

// Skipped returns how many frames were skipped so far because they were longer than [MaxPayload].
func (r *Reader) Skipped() uint64 { return r.skipped }

// Next returns the payload of the next frame, valid until the next call. A keepalive is an empty, non-nil slice.
//
// At the end of the input the error is [io.EOF] between frames and [io.ErrUnexpectedEOF] inside of one; a frame
// over [MaxFrame] is a [*FrameTooLargeError]; any other error is the underlying reader's. Each is final.
func (r *Reader) Next() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	p, err := r.next()
	r.err = err
	return p, err
}

func (r *Reader) next() ([]byte, error) {
	if _, err := r.br.Discard(r.held); err != nil {
		return nil, err
	}
	r.held = 0
	for {
		head, err := r.br.Peek(HeaderLen)
		if err != nil {
			if len(head) > 0 {
				err = truncated(err)
			}
			return nil, err
		}
		size := binary.BigEndian.Uint32(head)
		if size > MaxFrame {
			return nil, &FrameTooLargeError{Size: int64(size), Limit: MaxFrame}
		}
		if _, err := r.br.Discard(HeaderLen); err != nil {
			return nil, err
		}
		if size <= MaxPayload {
			return r.payload(int(size))
		}
		r.skipped++
		if _, err := r.br.Discard(int(size)); err != nil {
			return nil, truncated(err)
		}
	}
}

// payload reads n bytes, n being MaxPayload at most: in place where the buffer can hold them.
func (r *Reader) payload(n int) ([]byte, error) {
	if n <= r.br.Size() {
		p, err := r.br.Peek(n)
		if err != nil {
			return nil, truncated(err)
		}
		r.held = n
		return p, nil
	}
	if cap(r.large) < n {
		r.large = make([]byte, min(max(n, 2*cap(r.large)), MaxPayload))
	}
	p := r.large[:n]
	if _, err := io.ReadFull(r.br, p); err != nil {
		return nil, truncated(err)
	}
	return p, nil
}

// truncated turns an end of input inside a frame into [io.ErrUnexpectedEOF].
func truncated(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
