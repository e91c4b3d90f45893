package packet

import (
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

	// readBuffer holds the longest frame that is not skipped, and many of the usual size.
	readBuffer = 64 << 10
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
// goroutine. It waits for a frame with four bytes of memory, and has a buffer while there is something in it.
type Reader struct {
	r        io.Reader
	buffers  buffers
	head     [HeaderLen]byte
	buf      *[readBuffer]byte // nil: nothing is held
	off, end int               // what is held and not read
	skipped  uint64
	err      error
}

// buffers are those of readers that share them.
type buffers interface {
	Get() *[readBuffer]byte
	Put(b *[readBuffer]byte)
}

// NewReader returns a Reader of the frames in r.
func NewReader(r io.Reader) *Reader { return newReader(r, newBuffers()) }

func newReader(r io.Reader, b buffers) *Reader { return &Reader{r: r, buffers: b} }

// Skipped returns how many frames were skipped so far because they were longer than [MaxPayload].
func (r *Reader) Skipped() uint64 { return r.skipped }

// Next returns the payload of the next frame, valid until the next call for which [Reader.Ready] was false. A
// keepalive is an empty, non-nil slice.
//
// At the end of the input the error is [io.EOF] between frames and [io.ErrUnexpectedEOF] inside of one; a frame
// over [MaxFrame] is a [*FrameTooLargeError]; any other error is the underlying reader's. Each is final.
func (r *Reader) Next() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	p, err := r.next()
	if err != nil {
		r.err = err
		r.release()
	}
	return p, err
}

// Ready says whether the next frame is at hand in whole, so that the next call of Next reads nothing.
func (r *Reader) Ready() bool {
	if r.end-r.off < HeaderLen {
		return false
	}
	size := binary.BigEndian.Uint32(r.buf[r.off:])
	return size <= MaxPayload && r.end-r.off >= HeaderLen+int(size)
}

func (r *Reader) next() ([]byte, error) {
	for {
		size, err := r.header()
		switch {
		case err != nil:
			return nil, err
		case size > MaxFrame:
			return nil, &FrameTooLargeError{Size: int64(size), Limit: MaxFrame}
		case size == 0:
			return r.head[:0], nil
		case size <= MaxPayload:
			if err := r.need(int(size)); err != nil {
				return nil, truncated(err)
			}
			p := r.buf[r.off : r.off+int(size)]
			r.off += int(size)
			return p, nil
		}
		r.skipped++
		if err := r.skip(int(size)); err != nil {
			return nil, truncated(err)
		}
	}
}

// header reads a frame's header.
func (r *Reader) header() (size uint32, err error) {
	if r.off == r.end {
		r.release()
		_, err := io.ReadFull(r.r, r.head[:])
		return binary.BigEndian.Uint32(r.head[:]), err
	}
	if err := r.need(HeaderLen); err != nil {
		return 0, truncated(err)
	}
	size = binary.BigEndian.Uint32(r.buf[r.off:])
	r.off += HeaderLen
	return size, nil
}

// need reads until n bytes are held.
func (r *Reader) need(n int) error {
	if r.buf == nil {
		r.buf = r.buffers.Get()
	}
	if r.off+n > len(r.buf) || r.off == r.end {
		r.end = copy(r.buf[:], r.buf[r.off:r.end])
		r.off = 0
	}
	if missing := n - (r.end - r.off); missing > 0 {
		got, err := io.ReadAtLeast(r.r, r.buf[r.end:], missing)
		r.end += got
		return err
	}
	return nil
}

// skip reads past n bytes.
func (r *Reader) skip(n int) error {
	for n > 0 {
		if r.off == r.end {
			if err := r.need(1); err != nil {
				return err
			}
		}
		past := min(n, r.end-r.off)
		r.off += past
		n -= past
	}
	return nil
}

// release gives the buffer back. Nothing is held in it.
func (r *Reader) release() {
	if r.buf != nil {
		r.buffers.Put(r.buf)
		r.buf, r.off, r.end = nil, 0, 0
	}
}

// truncated turns an end of input inside a frame into [io.ErrUnexpectedEOF].
func truncated(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
