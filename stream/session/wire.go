package session

import (
	"encoding/binary"
	"net"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// yamux's frame: version, type, flags (2), stream (4), length (4), big-endian.
const (
	headerLen  = 12
	headerType = 1
	headerSize = 8
	typeData   = 0
)

// A wire is the connection as yamux sees it. A header is held back for the body
// that yamux writes next, as each write is a TLS record of its own. The time of what
// arrives is kept, and why it ended.
type wire struct {
	Conn
	began time.Time
	last  atomic.Int64 // since began
	err   atomic.Pointer[error]

	held []byte // yamux writes from one goroutine
}

func newWire(c Conn) *wire { return &wire{Conn: c, began: time.Now()} }

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.last.Store(int64(time.Since(w.began)))
	}
	if err != nil {
		w.err.CompareAndSwap(nil, &err)
	}
	return n, err
}

func (w *wire) Write(p []byte) (int, error) {
	switch {
	case len(w.held) > 0:
		w.held = append(w.held, p...)
		_, err := w.Conn.Write(w.held)
		w.held = w.held[:0]
		if err != nil {
			return 0, err
		}
		return len(p), nil
	case len(p) == headerLen && p[headerType] == typeData && binary.BigEndian.Uint32(p[headerSize:]) > 0:
		w.held = append(w.held, p...)
		return len(p), nil
	}
	return w.Conn.Write(p)
}

func (w *wire) heard() time.Time { return w.began.Add(time.Duration(w.last.Load())) }

// ended is why nothing more is read, nil while that goes on.
func (w *wire) ended() error {
	if err := w.err.Load(); err != nil {
		return *err
	}
	return nil
}

// logger takes what yamux says, which is about peers and never more than a fact.
type logger struct{ to *zap.Logger }

func (l logger) Print(v ...any)                 { l.to.Sugar().Debug(v...) }
func (l logger) Printf(format string, v ...any) { l.to.Sugar().Debugf(format, v...) }
func (l logger) Println(v ...any)               { l.to.Sugar().Debug(v...) }

var _ net.Conn = (*wire)(nil)
