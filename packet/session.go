package packet

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

const (
	// maxRecord is what one TLS record holds, in bytes (RFC 8446 section 5.1): frames that share a write stay
	// within it, as a second record costs a second seal and open for no gain.
	maxRecord = 16 << 10
	// lastWords is how long the reason of a failed write may take to arrive.
	lastWords = 100 * time.Millisecond
	// retireTimeout is how long what is under way on a connection that is given up for another one may take, until
	// the peer has ended its side.
	retireTimeout = 5 * time.Second
)

// session is one connection of a link: one that the link has dialled, which may be one-way, or a two-way one that the
// peer has dialled. One goroutine reads it for its whole life, and ends it. Whoever has something to write does so
// itself, as that does not wait; one at a time. Where the network takes no more, a goroutine waits for it.
type session struct {
	l       *Link
	c       Conn
	dialled bool // else accepted
	began   time.Time
	heard   atomic.Int64 // when something last arrived, by the pulse
	in      feed         // of the reader, where dialled

	// The writer's.
	flight []frame // being written
	batch  []byte  // flight as one write, where it holds several frames

	// Under the link's mutex.
	blank    bool          // an empty frame is to be written: the offer, its acceptance, or a keepalive
	writing  bool          // somebody is the writer
	idle     chan struct{} // closed when nobody is any more; nil: nobody wants to know
	answered time.Time     // up since; zero: not yet, and what was written waits in the next two
	written  uint64
	bytes    uint64
	twoWay   bool          // both sides send, and keep it alive
	said     int64         // when something was last written, by the pulse
	pause    int64         // in the pulse's seconds, until it is kept alive
	linger   time.Duration // how long the peer has to end its side; 0: it is not asked to
	broken   error         // a write failed: the peer may have half a frame, the connection is of no more use
	cause    error         // why this side ends it
	ending   bool          // it has left the link, and is not closed yet
}

// newSession makes a session, with the lock held.
func newSession(l *Link, c Conn) *session {
	s := &session{l: l, c: c, began: time.Now(), in: feed{r: l.o.Receiver, from: l.o.Peer, deliver: l.o.Deliver}}
	s.said = l.o.Pulse.now()
	s.heard.Store(s.said)
	s.breathe()
	return s
}

func (s *session) isUp() bool { return !s.answered.IsZero() }

// fill takes what is to be written next, and reports whether there is anything.
func (s *session) fill() bool {
	room := maxRecord
	if s.blank {
		room -= HeaderLen
	}
	s.flight = s.l.take(s.flight[:0], s.c.Coalesce(), room)
	return len(s.flight) > 0 || s.blank
}

// put writes what fill took. It lets the lock go meanwhile; the caller has seen that nobody else is writing.
func (s *session) put() {
	s.writing = true
	s.batch = s.batch[:0]
	if s.blank {
		s.batch = AppendFrame(s.batch, nil)
		s.blank = false
	}
	s.l.mu.Unlock()
	err := s.write()
	pending := err == nil && s.c.Pending()
	s.l.mu.Lock()
	if pending {
		go s.push()
		return
	}
	s.wrote(err)
}

func (s *session) write() error {
	buf := s.batch
	if len(buf) == 0 && len(s.flight) == 1 {
		buf = s.flight[0].buf
	} else {
		for _, f := range s.flight {
			buf = append(buf, f.buf...)
		}
		s.batch = buf
	}
	_, err := s.c.Write(buf)
	return err
}

// push waits until the network has taken what was written. It is the writer until then.
//
// Errors of setting a deadline are dropped here and below: they mean that the connection is closed, which the next
// read or write reports.
func (s *session) push() {
	_ = s.c.SetWriteDeadline(time.Now().Add(s.l.o.WriteTimeout))
	err := s.c.Flush()
	if err == nil {
		_ = s.c.SetWriteDeadline(time.Time{})
	}
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.wrote(err)
	s.l.flush()
}

// wrote ends a write. Frames of one that failed go back to the link.
func (s *session) wrote(err error) {
	s.writing = false
	if err == nil {
		s.account()
	} else {
		s.fail(fmt.Errorf("write frame: %w", err))
	}
	s.flight = s.flight[:0]
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
	if s.linger > 0 && s.broken == nil {
		s.hangUp()
	}
}

// account counts the flight as sent, or keeps the count until the peer has answered, and frees its buffers.
func (s *session) account() {
	s.said = s.l.o.Pulse.now()
	for i := range s.flight {
		s.written++
		s.bytes += uint64(len(s.flight[i].buf) - HeaderLen) //nolint:gosec // a frame holds its header
		s.l.queue.recycle(s.flight[i])
	}
	if s.isUp() {
		s.settle()
	}
}

func (s *session) settle() {
	s.l.sent(s.written, s.bytes)
	s.written, s.bytes = 0, 0
}

// fail takes a connection out of use on which a write failed. If that is because the peer ended it, what it said (a
// TLS alert) is on the way: the reader has a moment for it.
func (s *session) fail(err error) {
	s.broken = err
	s.l.untake(s.flight)
	switch {
	case s.cause != nil:
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.kill(err)
	default:
		s.l.leave(s)
		_ = s.c.SetReadDeadline(time.Now().Add(lastWords))
	}
}

// beat keeps the connection alive, or finds that it is dead or idle.
func (s *session) beat(now int64) {
	switch {
	case s.twoWay && now-s.heard.Load() >= int64(deadAfter/beatInterval):
		s.kill(errDead)
	case s.twoWay && now-s.said >= s.pause:
		s.blank = true
		s.breathe()
	case !s.twoWay && s.isUp() && now-s.said >= int64(s.l.o.IdleTimeout/beatInterval):
		s.quit(errIdle)
	}
}

// breathe chooses the length of the next silence.
func (s *session) breathe() {
	s.pause = int64((keepaliveAfter + spread(keepaliveSpread)) / beatInterval)
}

// kill ends a connection that is known to be of no use.
func (s *session) kill(why error) {
	s.cause = why
	s.l.leave(s)
	s.c.Abort()
}

// quit ends a connection gracefully on which nothing more is expected.
func (s *session) quit(why error) {
	s.cause = why
	s.l.leave(s)
	_ = s.c.SetReadDeadline(time.Unix(1, 0))
}

// retire takes a connection out of use without loss: what was written goes out, then the peer is told that nothing more
// comes, and what it sends until it ends its side is delivered.
func (s *session) retire(linger time.Duration) {
	s.linger = linger
	s.l.sessions = without(s.l.sessions, s)
	s.l.choose()
	s.l.retired = append(s.l.retired, s)
	if !s.writing {
		s.hangUp()
	}
}

// stop ends a connection since the link does. A write that is stuck must not hold that up.
func (s *session) stop() {
	switch {
	case s.writing && s.c.Pending():
		s.kill(errStopped)
	case s.twoWay:
		s.retire(lingerTimeout)
	default:
		s.quit(errStopped)
	}
}

// drain retires a connection that the peer has dialled, since this side takes nothing more.
func (s *session) drain() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if slices.Contains(s.l.sessions, s) {
		s.retire(lingerTimeout)
	}
}

// hangUp tells the peer that nothing more comes. It is called once, with nobody writing.
func (s *session) hangUp() {
	s.writing = true // and so it stays: nothing can be written any more
	_ = s.c.SetReadDeadline(time.Now().Add(s.linger))
	if err := s.c.CloseWrite(); err != nil || !s.c.Pending() {
		s.writing = false
		return
	}
	_ = s.c.SetWriteDeadline(time.Now().Add(s.linger))
	go func() {
		_ = s.c.Flush() // if it fails, the peer sees a connection that is cut off
		s.l.mu.Lock()
		defer s.l.mu.Unlock()
		s.linger = 0
		s.wrote(nil)
	}()
}

// answer notes that the peer took the connection, up since then: in TLS 1.3 a dialler whose certificate is
// refused learns so only after its handshake, so the handshake alone does not make a link up. Only the reader
// calls it, which also sees the end: a connection that ended is not answered afterwards.
func (s *session) answer(since time.Time) {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if s.isUp() {
		return
	}
	s.answered = since
	s.settle()
	if !slices.Contains(s.l.sessions, s) {
		return // broken or given up meanwhile, with a read deadline that stays
	}
	_ = s.c.SetReadDeadline(time.Time{})
	s.l.choose()
	s.l.up(s)
}

// accept notes that the peer takes the offer to send both ways.
func (s *session) accept() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.twoWay, s.l.plain = true, false
}

// run reads a connection that was dialled, to its end.
func (s *session) run() {
	limit := stableAfter
	if s.c.Coalesce() {
		limit = answerTimeout
	}
	s.l.mu.Lock()
	if s.cause == nil && s.linger == 0 {
		_ = s.c.SetReadDeadline(s.began.Add(limit))
	}
	s.l.mu.Unlock()
	var err error
	if s.c.Coalesce() {
		err = s.read()
	} else {
		err = s.watch()
	}
	s.end(err)
}

// Read implements io.Reader, for the reader of frames.
func (s *session) Read(p []byte) (int, error) {
	n, err := s.c.Read(p)
	if n > 0 {
		s.heard.Store(s.l.o.Pulse.now())
	}
	return n, err
}

// read returns why a connection of Culvert's protocol ended. The first frame is the peer's answer, an empty one. Any
// other tells that it takes the offer, if one was made.
func (s *session) read() error {
	frames := newReader(s, s.in.r.buffers)
	for n := 0; ; n++ {
		p, err := frames.Next()
		s.in.skipped(frames)
		switch {
		case err == nil:
		case n > 0:
			return fmt.Errorf("read: %w", err)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errNoAnswer
		default:
			return fmt.Errorf("connection ended unanswered: %w", err)
		}
		switch {
		case n == 0 && len(p) == 0:
			s.answer(time.Now())
			continue
		case len(p) > 0 && (n == 0 || s.in.deliver == nil):
			return errUnasked
		case n == 1 && s.in.deliver != nil:
			s.accept()
		}
		if len(p) == 0 {
			continue
		}
		if err := s.in.take(p, frames); err != nil {
			return fmt.Errorf("read: %w", err)
		}
	}
}

// watch returns why a native connection ended. The peer never answers, but one that refuses ends the connection
// soon: the read deadline passing is the answer. It reads without a [Reader], whose errors are final.
func (s *session) watch() error {
	var b [1]byte
	for up := false; ; {
		n, err := s.c.Read(b[:])
		switch {
		case n > 0:
			return errUnasked
		case err == nil:
		case up || errors.Is(err, os.ErrDeadlineExceeded) && s.isEnded():
			return fmt.Errorf("read: %w", err)
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.answer(s.began)
			up = true
		default:
			return fmt.Errorf("connection ended within %v: %w", stableAfter, err)
		}
	}
}

func (s *session) isEnded() bool {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	return s.cause != nil || s.broken != nil || s.linger > 0
}

// end ends the connection, whose reader has seen err, and tells the link. It is nobody's fault where it was idle, closed
// by the peer after it had answered, given up for another connection, or the link stopped.
func (s *session) end(err error) {
	l := s.l
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leave(s)
	l.retired = without(l.retired, s)
	expired := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, errNoAnswer)
	retired := s.linger > 0 || errors.Is(s.cause, errStopped)
	switch {
	case s.cause != nil:
		err = s.cause
	case s.broken != nil && expired:
		err = s.broken
	}
	clean := s.broken == nil && (retired || errors.Is(s.cause, errIdle) || s.cause == nil && s.isUp() && errors.Is(err, io.EOF))
	s.finish(clean)
	if s.ending {
		l.ending--
	}
	if !s.isUp() {
		l.drop(ReasonRefused, s.written)
		s.written = 0
	}
	if s.dialled && s.isUp() && !s.twoWay && s.linger == 0 {
		l.plain = true
	}
	if clean {
		err = nil
	}
	switch {
	case l.to != nil && l.to.isUp(), l.cancel != nil, l.stopped:
		l.logger().Debug("connection closed", zap.Bool("dialled", s.dialled), zap.Error(err))
	case l.to != nil:
		l.setState(stateDialing)
	case s.isUp():
		l.failed(stateIdle, err)
	default:
		l.failed(stateDown, err)
	}
	l.plan(s.isUp() && time.Since(s.answered) >= stableAfter)
}

// finish waits for the writer, and closes the connection. It lets the lock go meanwhile.
func (s *session) finish(clean bool) {
	if !clean {
		s.c.Abort() // a write that is stuck ends with it
	}
	for s.writing {
		idle := make(chan struct{})
		s.idle = idle
		s.l.mu.Unlock()
		<-idle
		s.l.mu.Lock()
	}
	if clean && s.broken == nil {
		s.l.mu.Unlock()
		_ = s.c.Close() // the end is decided; an error of telling the peer changes nothing
		s.l.mu.Lock()
	} else {
		s.c.Abort()
	}
}

func without(all []*session, s *session) []*session {
	return slices.DeleteFunc(all, func(o *session) bool { return o == s })
}
