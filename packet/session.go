package packet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"go.uber.org/zap"
)

const (
	// maxRecord is what one TLS record holds, in bytes (RFC 8446 section 5.1): frames that share a write stay
	// within it, as a second record costs a second seal and open for no gain.
	maxRecord = 16 << 10
	// answerBuffer is for the reader of an outbound connection, on which nothing but empty frames comes.
	answerBuffer = 64
	// lastWords is how long the reason of a failed write may take to arrive.
	lastWords = 100 * time.Millisecond
)

// session is one outbound connection of a link.
type session struct {
	l *Link
	c Conn

	flight []frame // being written
	batch  []byte  // flight as one write, where it holds several frames
	broken bool    // a write failed: the peer may have half a frame, the connection is of no more use

	began   time.Time     // run was called
	ended   chan struct{} // closed when the peer's side has ended
	readErr error         // why; read it after ended

	// Under the link's mutex.
	answered       time.Time // up since; zero: not yet, and what was written waits in these two
	written, bytes uint64
}

func newSession(l *Link, c Conn) *session {
	return &session{l: l, c: c, ended: make(chan struct{})}
}

// run writes frames until the connection ends or ctx does, and closes it. The error is nil for an end that is
// nobody's fault: idle, closed by the peer after it had answered, or the link stopped.
//
// Errors of setting a deadline are dropped here: they mean that the connection is closed, which the next read or
// write reports.
func (s *session) run(ctx context.Context) error {
	s.began = time.Now()
	limit := stableAfter
	if s.c.Coalesce() {
		limit = answerTimeout
	}
	_ = s.c.SetReadDeadline(s.began.Add(limit))
	go s.readLoop()
	// A write that blocks must not hold up a stop: a deadline in the past ends it.
	stop := onDone(ctx, func() { _ = s.c.SetWriteDeadline(time.Unix(1, 0)) })
	err := s.writeLoop(ctx)
	stop()
	return s.close(ctx, err)
}

// writeLoop returns why writing ended: an idle limit, the context's cause, a write error, or what the reader saw.
func (s *session) writeLoop(ctx context.Context) error {
	l, last := s.l, time.Now()
	idle := time.NewTimer(l.o.IdleTimeout)
	defer idle.Stop()
	for {
		select {
		case <-s.ended: // looked at before each write: a packet written now would be lost
			return s.readErr
		default:
		}
		if s.flight = l.take(s.flight[:0], s.c.Coalesce()); len(s.flight) > 0 {
			if err := s.write(ctx); err != nil {
				return err
			}
			last = time.Now()
			continue
		}
		select {
		case <-l.wake:
		case <-s.ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-idle.C:
			rest := l.o.IdleTimeout - time.Since(last)
			if rest <= 0 {
				return errIdle
			}
			idle.Reset(rest)
		}
	}
}

// write sends the flight in one Write; frames that failed go back to the link.
func (s *session) write(ctx context.Context) error {
	buf := s.flight[0].buf
	if len(s.flight) > 1 {
		s.batch = s.batch[:0]
		for _, f := range s.flight {
			s.batch = append(s.batch, f.buf...)
		}
		buf = s.batch
	}
	_ = s.c.SetWriteDeadline(time.Now().Add(s.l.o.WriteTimeout))
	// Looked at after that: the deadline in the past that a stop sets must not be overwritten unseen.
	if ctx.Err() != nil {
		s.l.untake(s.flight, false)
		return context.Cause(ctx)
	}
	if _, err := s.c.Write(buf); err != nil {
		s.broken = true
		s.l.untake(s.flight, true)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("write frame: %w", err)
	}
	s.account()
	return nil
}

// account counts the flight as sent, or keeps the count until the peer has answered, and frees its buffers.
func (s *session) account() {
	l := s.l
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range s.flight {
		s.written++
		s.bytes += uint64(len(f.buf) - HeaderLen) //nolint:gosec // a frame holds its header
		l.queue.recycle(f)
	}
	if !s.answered.IsZero() {
		s.settle()
	}
}

func (s *session) settle() {
	s.l.sent(s.written, s.bytes)
	s.written, s.bytes = 0, 0
}

// answer notes that the peer took the connection, up since then: in TLS 1.3 a dialler whose certificate is
// refused learns so only after its handshake, so the handshake alone does not make a link up. Only the reader
// calls it, which also sees the end: a connection that ended is not answered afterwards.
func (s *session) answer(since time.Time) {
	l := s.l
	l.mu.Lock()
	first := s.answered.IsZero()
	if first {
		s.answered = since
		s.settle()
		l.setState(stateUp)
	}
	l.mu.Unlock()
	if first {
		_ = s.c.SetReadDeadline(time.Time{})
		l.log.Info("link up", zap.Stringer("remote", s.c.RemoteAddr()))
	}
}

// readLoop sees the end of the connection before the next packet is lost in it.
func (s *session) readLoop() {
	defer close(s.ended)
	if s.c.Coalesce() {
		s.readErr = s.read()
	} else {
		s.readErr = s.watch()
	}
}

// read returns why a connection of Culvert's protocol ended, and takes the peer's answer.
func (s *session) read() error {
	r := newReaderSize(s.c, answerBuffer)
	for {
		p, err := r.Next()
		switch {
		case err == nil:
		case s.isAnswered():
			return fmt.Errorf("read: %w", err)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errNoAnswer
		default:
			return fmt.Errorf("connection ended unanswered: %w", err)
		}
		if len(p) > 0 {
			return errUnasked
		}
		s.answer(time.Now())
	}
}

// watch returns why a native connection ended. The peer never answers, but one that refuses ends the connection
// soon: the read deadline passing is the answer. It reads without a [Reader], whose errors are final.
func (s *session) watch() error {
	var b [1]byte
	for {
		n, err := s.c.Read(b[:])
		switch {
		case n > 0:
			return errUnasked
		case err == nil:
		case s.isAnswered():
			return fmt.Errorf("read: %w", err)
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.answer(s.began)
		default:
			return fmt.Errorf("connection ended within %v: %w", stableAfter, err)
		}
	}
}

// close ends the connection, waits for its reader and returns the fault, nil if the end was nobody's.
func (s *session) close(ctx context.Context, err error) error {
	stopped := ctx.Err() != nil && !errors.Is(err, errKicked)
	if s.broken && ctx.Err() == nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		// Writing failed because the peer ended the connection; what it said (a TLS alert) is on the way. No
		// deadline: for a native peer it would pass as an answer.
		_ = s.c.SetReadDeadline(time.Time{})
		t := time.NewTimer(lastWords)
		select {
		case <-s.ended:
			err = s.readErr
		case <-t.C:
		}
		t.Stop()
	}
	clean := stopped || errors.Is(err, errIdle) || s.isAnswered() && errors.Is(err, io.EOF)
	if clean && !s.broken {
		_ = s.c.Close() // the end is decided; an error of telling the peer changes nothing
	} else {
		s.c.Abort()
	}
	<-s.ended

	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.l.drop(ReasonRefused, s.written)
	s.written = 0
	if clean {
		return nil
	}
	return err
}

func (s *session) isAnswered() bool {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	return !s.answered.IsZero()
}
