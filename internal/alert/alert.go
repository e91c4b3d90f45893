// Package alert refuses TLS connections that were never handshaken: one fatal
// alert in plaintext, as RFC 8446 section 6.2 has it before keys exist, and a
// close that lets the peer read it.
//
//	alert.Refuse(conn, alert.NoApplicationProtocol) // owns conn from here on
//
// The functions block for at most [Budget] each, keep no state and may be
// called from any goroutine.
package alert

import (
	"io"
	"net"
	"time"

	"culvert/internal/pipe"
)

// Alert descriptions, RFC 8446 section 6 and RFC 7301 section 3.2.
const (
	InternalError         byte = 80
	DecodeError           byte = 50
	UnrecognizedName      byte = 112
	NoApplicationProtocol byte = 120
)

const (
	// Budget bounds how long [Refuse] and [Linger] take.
	Budget = time.Second
	// MaxLinger bounds how many bytes are read and thrown away meanwhile.
	MaxLinger = 64 << 10
)

// Record returns the TLS record of a fatal alert.
func Record(description byte) []byte {
	const (
		contentAlert = 21
		levelFatal   = 2
	)
	// The legacy record version is 0x0303 in everything but a first ClientHello
	// (RFC 8446 section 5.1).
	return []byte{contentAlert, 3, 3, 0, 2, levelFatal, description}
}

// Refuse sends a fatal alert and closes c, which it owns.
func Refuse(c net.Conn, description byte) {
	// An error here is a peer that has gone: nobody is left to tell.
	if c.SetDeadline(time.Now().Add(Budget)) == nil {
		_, _ = c.Write(Record(description))
	}
	Linger(c)
}

// Linger closes c, which it owns, so that what was written last arrives: a
// plain close with bytes unread sends a reset, which may overtake it. The write
// side is closed first, then the peer has up to [Budget] to end its own. One that
// does not is reset: between the two there may be a relay, which would hold its
// half of the connection for as long as the kernel waits for the peer's end.
func Linger(c net.Conn) {
	half, ok := c.(interface{ CloseWrite() error })
	if ok && c.SetDeadline(time.Now().Add(Budget)) == nil && half.CloseWrite() == nil {
		if _, err := io.CopyN(io.Discard, c, MaxLinger); err == io.EOF { //nolint:errorlint // io.CopyN gives it as it is
			_ = c.Close()
			return
		}
	}
	pipe.Abort(c)
}
