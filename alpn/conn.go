package alpn

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/certs"
	"culvert/internal/alert"
	"culvert/internal/pipe"
	"culvert/internal/sockopt"
)

// closeTimeout bounds the close_notify that [Conn.Close] sends.
const closeTimeout = time.Second

// A Conn is a TLS connection after its handshake, with its peer and its protocol
// known. It is a [net.Conn] with a half-close, and unlike a [tls.Conn] it tells
// an end that the peer meant from one that it did not:
//
//   - close_notify reads as [io.EOF],
//   - an end of the TCP connection without it as [io.ErrUnexpectedEOF],
//   - an alert as a [*RefusedError].
//
// One goroutine may read while another writes and a third closes.
//
// The [tls.Conn] in it may be handed out in its place, to what wants one, as
// net/http does: closing it closes the connection, in its own time.
type Conn struct {
	*tls.Conn
	wire   *wire
	more   bool // the last Read filled its buffer: there may be more of its record
	peer   certs.Identity
	route  Route
	intake *intake // the reader's; nil: crypto/tls reads for itself
}

// Peer is who the verified certificate of the far side names.
func (c *Conn) Peer() certs.Identity { return c.peer }

// Route is what was negotiated.
func (c *Conn) Route() Route { return c.route }

// Coalesce says whether frames that wait may share a TLS record: receivers of
// native protocols exist that lose what follows the first.
func (c *Conn) Coalesce() bool { return !c.route.Native }

// Pending says whether something that was written still waits in this process for
// the peer to make room. Only a packet connection keeps anything: its Write takes
// what it is given and does not wait, and should not be called again before Flush.
func (c *Conn) Pending() bool { return c.wire.eager != nil && c.wire.eager.pending() }

// Flush waits until nothing is pending any more, at most until the write deadline.
// An error leaves the connection of no use.
func (c *Conn) Flush() error {
	if c.wire.eager == nil {
		return nil
	}
	return c.wire.eager.flush()
}

// Version is the negotiated version for display, such as "TLS 1.3".
func (c *Conn) Version() string { return tls.VersionName(c.ConnectionState().Version) }

// Read reads as [tls.Conn.Read] does, but for the errors at the end, which
// [Conn] lists.
func (c *Conn) Read(p []byte) (int, error) {
	if c.intake != nil && len(p) > 0 {
		if err := c.intake.await(c.wire); err != nil {
			return 0, err
		}
	}
	n, err := c.Conn.Read(p)
	c.more = n == len(p)
	if c.intake != nil {
		c.intake.release()
	}
	if err == nil {
		return n, nil
	}
	c.intake = nil                            // crypto/tls may know what it says from now on without reading
	if err == io.EOF && c.wire.ended.Load() { //nolint:errorlint // io.EOF is never wrapped here, and this is the hot path
		// crypto/tls reads no further than it must: where the raw connection's
		// end reached it, it was still waiting for a record.
		return n, io.ErrUnexpectedEOF
	}
	return n, refused(err)
}

// ReadMore reads what there is without waiting: a record that has come whole. It
// returns 0 and nil if there is none.
func (c *Conn) ReadMore(p []byte) (int, error) {
	if c.intake != nil || !c.more && !c.wire.whole() {
		return 0, nil
	}
	c.wire.dry = true
	n, err := c.Read(p)
	c.wire.dry = false
	if errors.Is(err, errDry) {
		err = nil
	}
	return n, err
}

// AwaitRead waits until a Read is not going to wait for its first byte, as a rule, so
// that who reads needs no buffer meanwhile. It is for the goroutine that reads.
func (c *Conn) AwaitRead() {
	if !c.more {
		c.wire.await()
	}
}

// Write writes as [tls.Conn.Write] does. The records of a long p go out together.
func (c *Conn) Write(p []byte) (int, error) {
	if len(p) <= maxPlaintext || c.wire.eager != nil {
		return c.Conn.Write(p)
	}
	c.wire.cork.insert()
	n, err := c.Conn.Write(p)
	if failed := c.wire.cork.pull(c.wire.raw); failed != nil && err == nil {
		return 0, failed
	}
	return n, err
}

// CloseWrite sends close_notify and leaves the other direction as it is. What
// was written before goes out first, however long the peer takes to read it:
// the five seconds that crypto/tls would give it do not apply.
func (c *Conn) CloseWrite() error {
	c.wire.setPatient(true)
	defer c.wire.setPatient(false)
	return c.Conn.CloseWrite()
}

// Close sends close_notify, if [Conn.CloseWrite] has not, and closes the
// connection. It takes no longer than a second.
func (c *Conn) Close() error {
	c.wire.beginClose()
	return c.Conn.Close()
}

// Abort closes the connection with a reset and no close_notify. The peer's Read
// fails.
func (c *Conn) Abort() { pipe.Abort(c.wire.raw) }

// TCP returns the connection beneath, nil if it is of another kind. It is for
// options and for watching: what is read from it or written to it breaks TLS.
func (c *Conn) TCP() *net.TCPConn {
	tcp, _ := c.wire.raw.(*net.TCPConn)
	return tcp
}

// A RefusedError is an alert of the far side. In TLS 1.3 a dialler learns only
// by reading that its certificate was refused.
type RefusedError struct {
	Alert byte  // its description, RFC 8446 section 6; 0 is unknown
	Err   error // names it
}

func (e *RefusedError) Error() string { return "refused by the far side: " + e.Err.Error() }

// Unwrap returns Err.
func (e *RefusedError) Unwrap() error { return e.Err }

// Refused is for callers that know the error by its method alone.
func (e *RefusedError) Refused() bool { return true }

// Answered says that the alert is the far side's own, which refuses whichever way
// it is reached. A gateway on the way there says no more than that it has no route,
// or an internal error.
func (e *RefusedError) Answered() bool {
	return e.Alert != 0 && e.Alert != alert.UnrecognizedName && e.Alert != alert.InternalError
}

// refused marks the error that crypto/tls makes of an alert.
func refused(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return &RefusedError{Alert: description(op.Err), Err: op.Err}
	}
	return err
}

// description is the number of an alert. Its type is crypto/tls's own, and a byte.
func description(alert error) byte {
	if v := reflect.ValueOf(alert); v.Kind() == reflect.Uint8 {
		return byte(v.Uint()) //nolint:gosec // it is one
	}
	return 0
}

// wireBuffer is how much is read at once: several records. Where many connections
// wait, none of them holds such a buffer.
const wireBuffer = 64 << 10

//nolint:gochecknoglobals // buffers are of use to every connection of the process
var wireBuffers = sync.Pool{New: func() any { return new([wireBuffer]byte) }}

// A wire is the connection beneath TLS. It serves what was peeked first, counts
// bytes and remembers whether the end of the connection was read.
//
// No read goes beyond a record's end, so that crypto/tls never holds the next one:
// what has come and was not read is here, or in the kernel.
type wire struct {
	raw     net.Conn
	metrics *Metrics
	ended   atomic.Bool
	eager   *eager // nil: writes wait
	cork    cork   // where they do

	// Of the reader alone.
	source syscall.RawConn // of raw, if that is TCP
	chunk  []byte          // read from raw and not by crypto/tls
	buf    *[wireBuffer]byte
	err    error // comes after chunk
	dry    bool  // where nothing is in chunk a read fails, and does not wait
	turns  turns // while there is a handshake
	header [recordHeader]byte
	have   int // bytes of header
	body   int // bytes of the record that are still to come

	mu      sync.Mutex // orders changes of the write deadline
	patient bool       // in CloseWrite
	closing bool       // Close has begun
}

func newWire(raw net.Conn, peeked []byte, m *Metrics) *wire {
	w := &wire{raw: raw, chunk: peeked, metrics: m}
	if tcp, ok := raw.(*net.TCPConn); ok {
		w.source, _ = tcp.SyscallConn() // never fails on a connection that is one
	}
	m.wireIn.Add(float64(len(peeked)))
	return w
}

// A dryError crypto/tls takes for a deadline's: it goes on later where it was.
type dryError struct{}

func (dryError) Error() string   { return "nothing has come" }
func (dryError) Timeout() bool   { return true }
func (dryError) Temporary() bool { return true }

var errDry net.Error = dryError{}

func (w *wire) Read(p []byte) (int, error) {
	if w.dry && len(w.chunk) == 0 {
		return 0, errDry
	}
	w.await()
	if len(w.chunk) == 0 {
		err := w.err
		if !errors.Is(err, io.EOF) {
			w.err = nil // a deadline may be moved
		}
		return 0, err
	}
	n := copy(p, w.chunk[:w.within(min(len(p), len(w.chunk)))])
	if w.chunk = w.chunk[n:]; len(w.chunk) == 0 {
		w.release()
	}
	return n, nil
}

// whole says whether all that is left of a record, or all of the next one, has come.
func (w *wire) whole() bool {
	return w.body > 0 && len(w.chunk) >= w.body || w.body == 0 && w.have == 0 && isWhole(w.chunk)
}

// within returns how many of the next n bytes are of one record.
func (w *wire) within(n int) int {
	taken := 0
	if w.body == 0 {
		taken = copy(w.header[w.have:], w.chunk[:n])
		if w.have += taken; w.have < recordHeader {
			return taken
		}
		w.have, w.body = 0, int(binary.BigEndian.Uint16(w.header[3:]))
	}
	k := min(n-taken, w.body)
	w.body -= k
	return taken + k
}

// await waits until there is something to read, or an error.
func (w *wire) await() {
	if len(w.chunk) > 0 || w.err != nil {
		return
	}
	w.turns.end()
	defer w.turns.begin()
	n, err := 0, error(nil)
	if w.source == nil {
		w.buf = wireBuffers.Get().(*[wireBuffer]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
		n, err = w.raw.Read(w.buf[:])
	} else {
		n, err = w.readTCP()
	}
	if n > 0 {
		w.metrics.wireIn.Add(float64(n))
		w.chunk = w.buf[:n]
	} else {
		w.release()
		if errors.Is(err, io.EOF) {
			w.ended.Store(true)
		}
	}
	if n == 0 || !errors.Is(err, io.EOF) {
		w.err = err // an end together with bytes comes again: crypto/tls may need no more than these
	}
}

// readTCP reads, and holds a buffer only once there is something to read.
func (w *wire) readTCP() (n int, err error) {
	var failed error
	err = w.source.Read(func(fd uintptr) bool {
		w.buf = wireBuffers.Get().(*[wireBuffer]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
		for {
			n, failed = syscall.Read(int(fd), w.buf[:])
			switch failed {
			case syscall.EINTR:
				continue
			case syscall.EAGAIN:
				w.release()
				return false
			}
			return true
		}
	})
	switch {
	case err != nil:
		return 0, err
	case failed != nil:
		return 0, &net.OpError{Op: "read", Net: "tcp", Source: w.LocalAddr(), Addr: w.RemoteAddr(), Err: os.NewSyscallError("read", failed)}
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// release gives the buffer back. A hello that was peeked is forgotten: it must not
// live as long as its connection.
func (w *wire) release() {
	w.chunk = nil
	if w.buf != nil {
		wireBuffers.Put(w.buf)
		w.buf = nil
	}
}

func (w *wire) Write(p []byte) (n int, err error) {
	if w.eager != nil {
		n, err = w.eager.write(p)
	} else {
		n, err = w.cork.write(w.raw, p)
	}
	w.metrics.wireOut.Add(float64(n))
	return n, err
}

func (w *wire) setPatient(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.patient = on
}

// beginClose bounds every write from now on, one that is stuck included: a
// CloseWrite that waits for its peer holds the lock that tls.Conn.Close takes.
func (w *wire) beginClose() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing = true
	_ = w.raw.SetWriteDeadline(time.Now().Add(closeTimeout)) // an error means closed already
}

// SetWriteDeadline corrects the deadline that crypto/tls sets for close_notify.
// The one that it sets afterwards, to let further writes fail, is not in the
// future and passes.
func (w *wire) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now := time.Now(); t.After(now) {
		limit := now.Add(closeTimeout)
		switch {
		case w.closing && t.After(limit):
			t = limit
		case w.patient && !w.closing:
			t = time.Time{}
		}
	}
	return w.raw.SetWriteDeadline(t)
}

func (w *wire) Close() error                      { return w.raw.Close() }
func (w *wire) LocalAddr() net.Addr               { return w.raw.LocalAddr() }
func (w *wire) RemoteAddr() net.Addr              { return w.raw.RemoteAddr() }
func (w *wire) SetDeadline(t time.Time) error     { return w.raw.SetDeadline(t) }
func (w *wire) SetReadDeadline(t time.Time) error { return w.raw.SetReadDeadline(t) }

// tune sets the socket options for packets, where there is a socket. Those for
// streams it has from whoever accepted or dialled it. The connection works without
// them, only not as well.
func tune(c net.Conn, kind Kind) error {
	if tcp, ok := c.(*net.TCPConn); ok && kind == KindPacket {
		return sockopt.Packet(tcp)
	}
	return nil
}
