package session

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

// A Status is how the acceptor answers a stream: its first byte.
type Status byte

// The answers of culvert/session/1.
const (
	OK             Status = 0
	UnknownService Status = 1
	NotAllowed     Status = 2
	ServerDown     Status = 3
)

// String says it in words.
func (s Status) String() string {
	switch s {
	case OK:
		return "taken"
	case UnknownService:
		return "no such service there"
	case NotAllowed:
		return "not allowed there"
	case ServerDown:
		return "its local server does not take the stream"
	}
	return fmt.Sprintf("status %d", byte(s))
}

// A RefusedError is the answer to a stream that the far side does not take.
type RefusedError struct{ Status Status }

func (e *RefusedError) Error() string { return "refused by the far side: " + e.Status.String() }

// Refused is for callers that know the error by its method alone.
func (e *RefusedError) Refused() bool { return true }

// errNoAnswer is for a stream that was neither taken nor refused in time.
var errNoAnswer = errors.New("no answer to a stream in time")

// maxWrite bounds one frame, so that a long transfer leaves gaps for the others.
const maxWrite = 32 << 10

// A Stream is one stream of a session: a [net.Conn] whose ends are those of a TCP
// connection. CloseWrite is a FIN and reads as [io.EOF], Abort is a reset and reads
// as [syscall.ECONNRESET], behind what had been written. The end of the session is
// a reset too, and tells why.
type Stream struct {
	y       *yamux.Stream
	s       *Session
	id      uint32
	service string
	born    time.Time

	unanswered bool // of the side that opened it; the reader's
	moved      atomic.Int64

	mu       sync.Mutex
	mine     bool          // this side has ended its direction, or reset all
	theirs   word          // what the peer has said last
	ended    chan struct{} // closed when it has said something
	reset    chan struct{} // closed when it has reset the stream, or this side has
	isReset  bool
	stopped  chan struct{} // closed when a read deadline has passed before it was set
	isPassed bool
}

func newStream(s *Session, y *yamux.Stream, service string, dialled bool) *Stream {
	return &Stream{
		y: y, s: s, id: y.StreamID(), service: service, born: time.Now(), unanswered: dialled,
		ended: make(chan struct{}), reset: make(chan struct{}), stopped: make(chan struct{}),
	}
}

// Service is what the stream is for.
func (st *Stream) Service() string { return st.service }

// Moved is how many bytes were read and written so far.
func (st *Stream) Moved() int64 { return st.moved.Load() }

// Answer tells the side that opened the stream what becomes of it: once, before
// anything is written. Whoever refuses aborts behind it.
func (st *Stream) Answer(a Status) error {
	if _, err := st.y.Write([]byte{byte(a)}); err != nil {
		return fmt.Errorf("answer stream: %w", st.failed(err))
	}
	return nil
}

// Read implements [net.Conn]. The first one of the side that opened the stream
// waits for the answer; a refusal is a [*RefusedError].
func (st *Stream) Read(p []byte) (int, error) {
	if st.unanswered {
		if err := st.readAnswer(); err != nil {
			return 0, err
		}
		st.unanswered = false
	}
	n, err := st.y.Read(p)
	st.moved.Add(int64(n))
	if err != nil {
		return n, st.failed(err)
	}
	return n, nil
}

func (st *Stream) readAnswer() error {
	var answer [1]byte
	_, err := io.ReadFull(st.y, answer[:])
	switch {
	case errors.Is(err, yamux.ErrTimeout) && !st.passed():
		st.s.late.Store(true)
		return errNoAnswer
	case errors.Is(err, io.EOF):
		if err = st.failed(err); errors.Is(err, io.EOF) {
			err = syscall.ECONNRESET // closed without a word
		}
		return err
	case err != nil:
		return st.failed(err)
	case Status(answer[0]) != OK:
		return &RefusedError{Status(answer[0])}
	}
	if !st.passed() {
		_ = st.y.SetReadDeadline(time.Time{}) // it has no error
	}
	return nil
}

// failed says in the terms of a TCP connection why yamux reads or writes no more.
func (st *Stream) failed(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return st.end()
	case st.wasReset(), errors.Is(err, yamux.ErrConnectionReset):
		return syscall.ECONNRESET
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	case errors.Is(err, yamux.ErrStreamClosed):
		err = net.ErrClosed
	}
	return st.s.cause(err)
}

// end tells what the end of a stream was, which the peer has said before it.
func (st *Stream) end() error {
	if st.s.isMute() {
		st.told(wordEnd)
		return st.s.cause(io.EOF)
	}
	limit := time.NewTimer(wordTimeout)
	defer limit.Stop()
	select {
	case <-st.ended:
	case <-st.s.Done():
	case <-limit.C:
	case <-st.s.mute:
		st.told(wordEnd)
	}
	st.mu.Lock()
	said := st.theirs
	st.mu.Unlock()
	switch said {
	case wordEnd:
		return io.EOF
	case wordReset:
		return syscall.ECONNRESET
	}
	return st.s.cause(io.ErrUnexpectedEOF)
}

// Write implements [net.Conn].
func (st *Stream) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		if st.wasReset() {
			return done, syscall.ECONNRESET
		}
		n, err := st.y.Write(p[done:min(len(p), done+maxWrite)])
		done += n
		st.moved.Add(int64(n))
		if err != nil {
			return done, st.failed(err)
		}
	}
	return done, nil
}

// CloseWrite ends this side's direction; the other goes on.
func (st *Stream) CloseWrite() error {
	if !st.finish() {
		return nil
	}
	return st.say(wordEnd)
}

// finish ends this side's direction once.
func (st *Stream) finish() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.mine {
		return false
	}
	st.mine = true
	return true
}

// say tells the peer, and ends the stream as far as yamux is concerned.
func (st *Stream) say(w word) error {
	var err error
	if st.s.words != nil {
		err = st.s.words.say(w, st.id)
	}
	_ = st.y.Close() // a second time it does nothing
	st.leave()
	if err != nil {
		return st.s.cause(err)
	}
	return nil
}

// told notes what the peer says.
func (st *Stream) told(w word) {
	if w == wordReset {
		st.cut() // before the reader is told
	}
	st.mu.Lock()
	if st.theirs == 0 {
		close(st.ended)
	}
	st.theirs = max(st.theirs, w)
	st.mu.Unlock()
	if w == wordReset {
		_ = st.y.SetWriteDeadline(time.Unix(1, 0)) // whoever waits for a window waits in vain
	}
	st.leave()
}

// cut notes a reset.
func (st *Stream) cut() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.isReset {
		st.isReset = true
		close(st.reset)
	}
}

func (st *Stream) wasReset() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.isReset
}

// leave forgets the stream when both sides have had their word. Until then it
// counts, as what the peer sends takes memory even when nobody reads it.
func (st *Stream) leave() {
	st.mu.Lock()
	over := st.mine && st.theirs != 0
	st.mu.Unlock()
	if over {
		st.s.forget(st)
	}
}

// Abort resets the stream. What was written before arrives all the same. It waits
// for nothing. A peer without words could only take it for a clean end: there it
// resets the whole session.
func (st *Stream) Abort() {
	st.mu.Lock()
	over := st.mine && st.theirs == wordEnd
	st.mine = true
	st.mu.Unlock()
	if over {
		return // there is nothing to reset
	}
	st.cut()
	_ = st.y.SetDeadline(time.Unix(1, 0)) // it has no error
	if st.s.isMute() {
		st.s.Abort()
		return
	}
	st.s.start(func() { _ = st.say(wordReset) }) // where it fails the session has ended
}

// Close ends the stream: cleanly where the peer has ended its direction, and
// otherwise with a reset, as nobody reads what it sends.
func (st *Stream) Close() error {
	st.mu.Lock()
	clean := st.theirs == wordEnd || st.isReset
	st.mu.Unlock()
	if clean {
		return st.CloseWrite()
	}
	st.Abort()
	return nil
}

// AwaitReset waits on a stream that has been read to its end, and reports whether
// it was reset behind that, or died with its session. It returns false when its
// read deadline passes.
func (st *Stream) AwaitReset() bool {
	select {
	case <-st.reset:
		return true
	case <-st.s.Done():
		return true
	case <-st.stopped:
		return false
	}
}

// SetReadDeadline implements [net.Conn].
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.mu.Lock()
	if !t.IsZero() && !t.After(time.Now()) && !st.isPassed {
		st.isPassed = true
		close(st.stopped)
	}
	st.mu.Unlock()
	return st.y.SetReadDeadline(t)
}

func (st *Stream) passed() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.isPassed
}

// SetWriteDeadline implements [net.Conn].
func (st *Stream) SetWriteDeadline(t time.Time) error { return st.y.SetWriteDeadline(t) }

// SetDeadline implements [net.Conn].
func (st *Stream) SetDeadline(t time.Time) error {
	return errors.Join(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

// LocalAddr is the session's.
func (st *Stream) LocalAddr() net.Addr { return st.s.wire.LocalAddr() }

// RemoteAddr is the session's.
func (st *Stream) RemoteAddr() net.Addr { return st.s.wire.RemoteAddr() }
