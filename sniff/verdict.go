package sniff

import (
	"errors"
	"net"
	"os"
)

// The reasons for which a connection is refused at its hello, as metrics name
// them.
const (
	reasonTimeout   = "hello_timeout"
	reasonMalformed = "hello_malformed"
	reasonTooLarge  = "hello_too_large"
	reasonBusy      = "hello_busy"
	reasonTruncated = "hello_truncated"
)

// The alerts that answer them (RFC 8446 section 6).
const (
	alertDecodeError   = 50
	alertInternalError = 80
)

// Reasons lists every reason that [Verdict] gives but "".
func Reasons() []string {
	return []string{reasonTimeout, reasonMalformed, reasonTooLarge, reasonBusy, reasonTruncated}
}

// Verdict turns an error of [Conn.Hello], or of the connection before it, into
// the reason for which the connection is refused and the alert that tells its
// client, 0 for a reset. The reason is "" where the connection was closed on this
// side: whoever did that knows why.
func Verdict(err error) (reason string, alert byte) {
	var large *TooLargeError
	switch {
	case errors.Is(err, net.ErrClosed):
		return "", 0
	case errors.Is(err, os.ErrDeadlineExceeded):
		return reasonTimeout, 0
	case errors.As(err, &large):
		return reasonTooLarge, alertDecodeError
	case errors.Is(err, ErrMalformed), errors.Is(err, ErrNotTLS):
		return reasonMalformed, alertDecodeError
	case errors.Is(err, ErrBusy):
		return reasonBusy, alertInternalError
	}
	return reasonTruncated, 0 // an end or a reset before the hello was whole
}
