// Package session carries many streams over one connection to a peer, so that
// a new stream costs no handshake: protocol culvert/session/1.
//
//	s, err := session.Dial(conn, session.Options{})   // one side
//	c, err := s.Open("gossip-stream")                 // at once; what is written travels with the question
//
//	s, err := session.Accept(conn, session.Options{}) // the other
//	err = s.Serve(func(st *session.Stream) { ... st.Answer(session.OK) ... })
//
// It is hashicorp/yamux with what a relay of TCP connections needs and yamux
// lacks: a stream that ends tells whether it ended or was reset, and may be reset
// after its half-close. One stream of each session, whose name is empty, carries
// these words (docs/wire.md). A session does not ping by itself: who uses it asks
// [Session.Heard] and [Session.Ping], so that a lost answer costs no stream.
//
// The side that dialled opens streams, the other accepts them. A session owns
// its connection. All methods may be called from any goroutine; of a [Stream]
// one may read while another writes and a third aborts.
package session

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/zap"
)

// What [Options] say otherwise.
const (
	// DefaultWindow is how much of one stream may be on its way or waiting for
	// its reader: 80 MB/s over a path of 100 ms. A kernel gives a connection of
	// its own 6 MiB.
	DefaultWindow = 8 << 20
	// DefaultMaxStreams bounds what one session carries at once.
	DefaultMaxStreams = 128
	// DefaultAnswerTimeout is how long the far side has to take a stream.
	DefaultAnswerTimeout = 10 * time.Second
	// DefaultTimeout is when a connection that takes nothing is given up, or one
	// whose peer does not answer a ping; TCP has given it up by then where it notices
	// by itself.
	DefaultTimeout = 60 * time.Second
)

const (
	maxName = 63
	backlog = 256
	// nameTimeout is how long the name of a stream may take behind its opening.
	nameTimeout = 10 * time.Second
)

// A Conn is a connection with an end that its peer cannot take for a clean one.
type Conn interface {
	net.Conn
	Abort()
}

// Options are the settings of a [Session]. Zero means the default of the same
// name.
type Options struct {
	Window        int // bytes, 256 KiB at least
	MaxStreams    int // of the acceptor; more are refused
	AnswerTimeout time.Duration
	Timeout       time.Duration
	Log           *zap.Logger // what yamux says, at debug; nil: none
}

// A Session is one connection that carries streams.
type Session struct {
	mux  *yamux.Session
	wire *wire
	o    Options
	late atomic.Bool // a stream was not answered in time

	words   *words        // nil where the dialler has none; known before any other stream is
	mute    chan struct{} // closed when the acceptor has none
	opening sync.Mutex    // streams are opened in the order of their numbers

	mu      sync.Mutex
	streams map[uint32]*Stream
	early   map[uint32]word // about streams that are not known here yet
	newest  uint32          // the largest number of a stream that was known here
	over    bool            // no more goroutines are started

	wg sync.WaitGroup
}

// ErrFull is why a stream is not opened on a session that carries as many as
// it may, or whose peer takes no more.
var ErrFull = errors.New("session takes no more streams")

func (o Options) withDefaults() Options {
	if o.Window == 0 {
		o.Window = DefaultWindow
	}
	if o.MaxStreams == 0 {
		o.MaxStreams = DefaultMaxStreams
	}
	if o.AnswerTimeout == 0 {
		o.AnswerTimeout = DefaultAnswerTimeout
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return o
}

// config turns yamux's own clocks off: a ping that is lost would end every stream,
// and a half-closed stream would be ended after five minutes.
func (o Options) config() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          backlog,
		KeepAliveInterval:      time.Minute, // must be set, and is not used
		ConnectionWriteTimeout: o.Timeout,
		MaxStreamWindowSize:    uint32(o.Window), //nolint:gosec // checked by yamux
		Logger:                 logger{o.Log},
	}
}

func newSession(c Conn, o Options, start func(io.ReadWriteCloser, *yamux.Config) (*yamux.Session, error)) (*Session, error) {
	o = o.withDefaults()
	s := &Session{
		wire: newWire(c), o: o, mute: make(chan struct{}),
		streams: make(map[uint32]*Stream), early: make(map[uint32]word),
	}
	var err error
	if s.mux, err = start(s.wire, o.config()); err != nil {
		c.Abort()
		return nil, fmt.Errorf("begin session: %w", err)
	}
	return s, nil
}

// Dial begins the session of the side that dialled. It owns c, and waits for
// nothing.
func Dial(c Conn, o Options) (*Session, error) {
	s, err := newSession(c, o, yamux.Client)
	if err != nil {
		return nil, err
	}
	y, err := s.openNamed("")
	if err != nil {
		s.Abort()
		return nil, fmt.Errorf("begin session: %w", s.cause(err))
	}
	s.words = &words{y: y}
	s.start(func() {
		if s.isAnswered(y) {
			s.listen(y)
		}
	})
	return s, nil
}

// Accept begins the session of the other side. It owns c.
func Accept(c Conn, o Options) (*Session, error) { return newSession(c, o, yamux.Server) }

// openNamed opens a stream and says what it is for.
func (s *Session) openNamed(service string) (*yamux.Stream, error) {
	y, err := s.mux.OpenStream()
	if err != nil {
		return nil, err
	}
	if _, err := y.Write(append([]byte{byte(len(service))}, service...)); err != nil { //nolint:gosec // a service's name is short
		return nil, err
	}
	return y, nil
}

// Open opens a stream to a service, of which the far side is not asked first: a
// refusal is the error of the first Read. The error is or wraps [ErrFull], or says
// why the session has ended.
func (s *Session) Open(service string) (*Stream, error) {
	if len(service) == 0 || len(service) > maxName {
		return nil, fmt.Errorf("open stream to service %q: want a name of 1 to %d bytes", service, maxName)
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.Streams() >= s.o.MaxStreams {
		return nil, ErrFull
	}
	y, err := s.openNamed(service)
	switch {
	case errors.Is(err, yamux.ErrRemoteGoAway):
		return nil, ErrFull
	case err != nil:
		return nil, fmt.Errorf("open stream: %w", s.cause(err))
	}
	_ = y.SetReadDeadline(time.Now().Add(s.o.AnswerTimeout)) // it has no error
	return s.register(y, service, true), nil
}

// Serve hands each stream that the peer opens to handle, which owns it, in a
// goroutine of its own. It returns when the session has ended and all of them
// have, and why it ended: nil where one of the sides closed it.
func (s *Session) Serve(handle func(*Stream)) error {
	for first := true; ; first = false {
		y, err := s.mux.AcceptStream()
		if err != nil {
			break
		}
		if !first {
			// Known at once, as the peer may have its word before the name is read.
			st := s.register(y, "", false)
			s.start(func() {
				name, err := readName(y)
				s.take(st, name, err, handle)
			})
			continue
		}
		// It may be the one of words: whether there is one is to be known before
		// any other stream is.
		name, err := readName(y)
		if err == nil && name == "" {
			s.acceptWords(y)
			continue
		}
		st := s.register(y, "", false)
		s.start(func() { s.take(st, name, err, handle) })
	}
	s.Wait()
	if err := s.wire.ended(); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("session ended: %w", err)
	}
	return nil
}

// acceptWords answers the stream of words before anything is said on it.
func (s *Session) acceptWords(y *yamux.Stream) {
	if _, err := y.Write([]byte{byte(OK)}); err != nil {
		return // the session has ended
	}
	s.words = &words{y: y}
	s.start(func() { s.listen(y) })
}

// take hands on a stream whose name was read, or ends it without an answer.
func (s *Session) take(st *Stream, name string, err error, handle func(*Stream)) {
	if err == nil && name == "" {
		err = errors.New("a second stream of words")
	}
	if err == nil && s.Streams() > s.o.MaxStreams {
		err = ErrFull
	}
	if err != nil {
		s.o.Log.Debug("stream not taken", zap.Error(err))
		st.Abort()
		return
	}
	st.service = name
	handle(st)
}

// readName reads the length and the name behind it.
func readName(y *yamux.Stream) (string, error) {
	_ = y.SetReadDeadline(time.Now().Add(nameTimeout)) // it has no error
	var length [1]byte
	if _, err := io.ReadFull(y, length[:]); err != nil {
		return "", fmt.Errorf("read length of name: %w", err)
	}
	if length[0] > maxName {
		return "", fmt.Errorf("name of %d bytes, at most %d", length[0], maxName)
	}
	name := make([]byte, length[0])
	if _, err := io.ReadFull(y, name); err != nil {
		return "", fmt.Errorf("read name: %w", err)
	}
	return string(name), y.SetReadDeadline(time.Time{})
}

// register makes a stream known, and tells it what was said of it before.
func (s *Session) register(y *yamux.Stream, service string, dialled bool) *Stream {
	st := newStream(s, y, service, dialled)
	s.mu.Lock()
	s.streams[st.id] = st
	s.newest = max(s.newest, st.id)
	w, told := s.early[st.id]
	delete(s.early, st.id)
	s.mu.Unlock()
	if told {
		st.told(w)
	}
	return st
}

// forget takes a stream out when both its directions are over.
func (s *Session) forget(st *Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st.id)
}

// Streams is how many streams are open.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// Settled tells whether a stream is open that has been so for longer than age, or
// that has moved more than bytes: one that others had better not wait behind.
func (s *Session) Settled(age time.Duration, bytes int64) bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.streams {
		if now.Sub(st.born) > age || st.Moved() > bytes {
			return true
		}
	}
	return false
}

// GoAway tells the peer that no more streams are taken. Those that are open go
// on.
func (s *Session) GoAway() error {
	if err := s.mux.GoAway(); err != nil {
		return fmt.Errorf("say that no more streams are taken: %w", err)
	}
	return nil
}

// Ping asks the peer for a sign of life and returns how long that took. It
// gives up after Options.Timeout, or when the session has ended.
func (s *Session) Ping() (time.Duration, error) {
	d, err := s.mux.Ping()
	if err != nil {
		return 0, fmt.Errorf("ping: %w", err)
	}
	return d, nil
}

// Heard is when something last came from the peer.
func (s *Session) Heard() time.Time { return s.wire.heard() }

// Late tells that the peer has left a stream unanswered for too long.
func (s *Session) Late() bool { return s.late.Load() }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Wait waits for the end of the session and of its goroutines.
func (s *Session) Wait() {
	<-s.Done()
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.wg.Wait()
}

// start runs f in a goroutine that Wait waits for. A session that has ended has
// nothing more to do.
func (s *Session) start(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.wg.Go(f)
	}
}

// isMute tells that the peer cannot be told of a reset.
func (s *Session) isMute() bool {
	if s.words == nil {
		return true
	}
	select {
	case <-s.mute:
		return true
	default:
		return false
	}
}

// Close ends the session and the streams that are left, gracefully as far as the
// connection knows how.
func (s *Session) Close() error { return s.mux.Close() }

// Abort resets the connection, and so all streams.
func (s *Session) Abort() {
	s.wire.Abort()
	_ = s.mux.Close() // it returns nil
}

// cause is why the session does no more, where it has ended, and otherwise err.
func (s *Session) cause(err error) error {
	select {
	case <-s.Done():
	default:
		return err
	}
	switch ended := s.wire.ended(); {
	case ended == nil:
		return net.ErrClosed // by this side
	case errors.Is(ended, io.EOF):
		return io.ErrUnexpectedEOF // streams were open
	default:
		return ended
	}
}
