package session

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/zap"
)

// A word is what one side says of a direction of a stream: that it has ended, or
// that the whole stream was reset. It is written before yamux's own FIN, which
// cannot tell the two apart.
type word byte

const (
	wordEnd   word = 1
	wordReset word = 2
)

const (
	wordLen = 5 // the word, and the stream's number, big-endian
	// wordTimeout is how long the word may be behind the FIN that it was written
	// before. It bounds what should not happen.
	wordTimeout = 10 * time.Second
	// maxEarly bounds words about streams to come, which yamux's backlog bounds.
	maxEarly = 2 * backlog
)

// words is the stream on which both sides say what becomes of the others.
type words struct {
	mu sync.Mutex
	y  *yamux.Stream
}

func (c *words) say(w word, id uint32) error {
	b := binary.BigEndian.AppendUint32([]byte{byte(w)}, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.y.Write(b)
	return err
}

// isAnswered waits for the acceptor's answer to the stream of words. One that has
// never heard of them says no, and the session goes on without.
func (s *Session) isAnswered(y *yamux.Stream) bool {
	var answer [1]byte
	if _, err := io.ReadFull(y, answer[:]); err != nil || Status(answer[0]) != OK {
		close(s.mute)
		return false
	}
	return true
}

// listen hears words until the session ends.
func (s *Session) listen(y *yamux.Stream) {
	_ = y.SetReadDeadline(time.Time{}) // it has no error
	var b [wordLen]byte
	for {
		if _, err := io.ReadFull(y, b[:]); err != nil {
			return
		}
		if err := s.hear(word(b[0]), binary.BigEndian.Uint32(b[1:])); err != nil {
			s.o.Log.Debug("session given up", zap.Error(err))
			s.Abort()
			return
		}
	}
}

// hear passes a word on to its stream, or keeps it for one that is yet to come. Words
// that this version does not know say nothing to it.
func (s *Session) hear(w word, id uint32) error {
	if w != wordEnd && w != wordReset {
		return nil
	}
	s.mu.Lock()
	st := s.streams[id]
	if st == nil && id > s.newest { // a smaller number is one of a stream that is over
		s.early[id] = max(s.early[id], w)
	}
	tooMany := len(s.early) > maxEarly
	s.mu.Unlock()
	if st != nil {
		st.told(w)
	}
	if tooMany {
		return fmt.Errorf("words about %d streams that there are not", maxEarly)
	}
	return nil
}
