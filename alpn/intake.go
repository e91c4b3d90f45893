package alpn

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"net"
	"reflect"
	"syscall"
	"unsafe"

	"culvert/internal/free"
)

const (
	// recordHeader and maxCiphertext are the lengths of RFC 8446 section 5.2, in
	// bytes.
	recordHeader  = 5
	maxCiphertext = 16384 + 256
	// intakeSize holds the longest record, and many short ones at once.
	intakeSize = 32 << 10
)

// intakes are buffers to read into, for all connections of a [Server] or [Dialer].
type intakes = free.List[[intakeSize]byte]

// An intake reads records from the socket of a packet connection in the place of
// crypto/tls, and puts them where that would have put them: into its rawInput. For
// what crypto/tls does itself costs an object for each record (the io.Reader that it
// hands to bytes.Buffer.ReadFrom), and a buffer that each connection keeps for good,
// as large as the largest record that it has seen. Here a buffer is held only
// while there is something in it.
//
// What crypto/tls makes of the records is its own as before: an intake sees their
// lengths alone. It relies on two unexported fields, of these names and types:
// where they are missing there is no intake, and tls.Conn reads for itself. A test
// fails then.
type intake struct {
	raw     *bytes.Buffer // tls.Conn.rawInput: records, not decrypted
	input   *bytes.Reader // tls.Conn.input: what is left of the last one, decrypted in place
	rc      syscall.RawConn
	try     func(fd uintptr) bool // attempt, bound once
	buffers *intakes
	buf     *[intakeSize]byte // holds raw and input; nil: crypto/tls has a buffer of its own, or none

	n   int // of attempt
	err error
}

// newIntake returns nil where crypto/tls has to read for itself.
func newIntake(t *tls.Conn, raw net.Conn, buffers *intakes) *intake {
	tcp, ok := raw.(*net.TCPConn)
	if !ok || !canTry {
		return nil
	}
	typ := reflect.TypeFor[tls.Conn]()
	rawInput, ok1 := typ.FieldByName("rawInput")
	input, ok2 := typ.FieldByName("input")
	if !ok1 || !ok2 || rawInput.Type != reflect.TypeFor[bytes.Buffer]() || input.Type != reflect.TypeFor[bytes.Reader]() {
		return nil
	}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	in := &intake{
		raw:   (*bytes.Buffer)(unsafe.Add(unsafe.Pointer(t), rawInput.Offset)), //nolint:gosec // a field of that type, see above
		input: (*bytes.Reader)(unsafe.Add(unsafe.Pointer(t), input.Offset)),    //nolint:gosec // likewise
		rc:    rc, buffers: buffers,
	}
	in.try = in.attempt
	in.release() // what the handshake needed
	return in
}

// await waits until crypto/tls can go on with what it has: decrypted bytes, or a
// whole record, or the end of the connection, which it is left to read.
func (in *intake) await(w *wire) error {
	for in.input.Len() == 0 && len(w.chunk) == 0 && !isWhole(in.raw.Bytes()) {
		in.n, in.err = 0, nil
		if err := in.rc.Read(in.try); err != nil {
			return err
		}
		if in.err != nil || in.n == 0 {
			return in.err
		}
		w.metrics.wireIn.Add(float64(in.n))
	}
	return nil
}

// attempt reads what there is behind what raw holds. Nothing else refers to its
// memory, as input is empty.
func (in *intake) attempt(fd uintptr) bool {
	buf := in.buf
	if buf == nil {
		buf = in.buffers.Get()
	}
	had := copy(buf[:], in.raw.Bytes())
	n, again, err := tryRead(fd, buf[had:])
	if again && had == 0 {
		in.buffers.Put(buf)
		in.buf = nil
		return false
	}
	in.buf, in.n, in.err = buf, n, err
	*in.raw = *bytes.NewBuffer(buf[:had+n])
	return !again
}

// release gives the buffer back if nothing is left in it.
func (in *intake) release() {
	if in.raw.Len() > 0 || in.input.Len() > 0 {
		return
	}
	*in.raw = bytes.Buffer{}
	in.input.Reset(nil)
	if in.buf != nil {
		in.buffers.Put(in.buf)
		in.buf = nil
	}
}

// isWhole says whether crypto/tls will not read any further for the first record
// of b. One that announces too much it refuses.
func isWhole(b []byte) bool {
	if len(b) < recordHeader {
		return false
	}
	n := int(binary.BigEndian.Uint16(b[3:]))
	return n > maxCiphertext || len(b) >= recordHeader+n
}
