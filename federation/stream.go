package federation

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"culvert/federation/state"
	"culvert/internal/pause"
)

const (
	// streamEvery is how often a reader of a stream is sent something at most.
	// What happens in between comes together.
	streamEvery = 250 * time.Millisecond
	// checkEvery is how often a stream on which nothing happens is looked after.
	checkEvery = 5 * time.Second
	// astrayWait is how long a stream of a sidecar lasts that had better not be
	// asked: not for long, as its clients come back on new connections, and not
	// so short that their handshakes are all that it does.
	astrayWait = 15 * time.Second
	// maxMessages is how many messages are kept for a state. Those who follow it
	// are at few different indices.
	maxMessages = 16
)

// streamType is the content type of a stream: a line of JSON for each message.
const streamType = "application/x-ndjson"

// A message is one line of a stream: what a reader has to do to what it has to
// have what there is.
type message struct {
	Store   string            `json:"store"`
	Index   uint64            `json:"index"`
	Full    bool              `json:"full"` // the records are all there are
	Records []json.RawMessage `json:"records"`
}

func (m message) encode() []byte {
	if m.Records == nil {
		m.Records = []json.RawMessage{}
	}
	b, err := json.Marshal(m)
	if err != nil { // the records are JSON
		panic(fmt.Sprintf("encode message: %v", err))
	}
	return append(b, '\n')
}

// A position is how far a reader has come.
type position struct {
	store string
	index uint64
}

// passed tells whether a reader at p has not got what a state has. Of the same
// store only what is newer counts.
func (p position) passed(s *state.State) bool { return s.Store() != p.store || s.Index() > p.index }

// next is where a reader at p is after a message of a state.
func (p position) next(s *state.State) position {
	if p.store == s.Store() {
		return position{p.store, max(p.index, s.Index())}
	}
	return position{s.Store(), s.Index()}
}

// A streaming is one reader's stream under way.
type streaming struct {
	*reads
	w    io.Writer
	out  *http.ResponseController
	at   position
	lost bool // its reader was told to ask somebody else

	check *time.Ticker
	renew time.Time // when the write deadline is to be moved
}

// stream answers with one message at once, and with another whenever there is
// something newer, until the reader's time is over or it has gone.
func (h *reads) stream(w http.ResponseWriter, r *http.Request, q query) {
	st := &streaming{reads: h, w: w, out: http.NewResponseController(w), at: position{q.store, q.index}}
	limit := q.limit()
	if st.lost = h.astray != nil && h.astray(); st.lost {
		limit = min(limit, astrayWait)
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	st.check = time.NewTicker(checkEvery)
	defer st.check.Stop()
	s := h.source.State()
	h.head(w, s)
	w.Header().Set("Content-Type", streamType)
	for full := differs(r, s, q); ; full = false {
		next := time.Now().Add(jitter(streamEvery))
		if st.send(h.cache.of(s, st.at, full)) != nil {
			return // the reader has gone, or does not read
		}
		st.at = st.at.next(s)
		if !st.await(ctx) {
			return
		}
		if d := time.Until(next); d > 0 && !pause.For(ctx, d) {
			return
		}
		s = h.source.State()
	}
}

// send writes a message.
func (st *streaming) send(message []byte) error {
	st.extend()
	if _, err := st.w.Write(message); err != nil {
		return err
	}
	return st.out.Flush()
}

// extend gives what is written from now on about writeSlack. It does so every few
// seconds and not for each message: that is work for the connection.
func (st *streaming) extend() {
	if now := time.Now(); !now.Before(st.renew) {
		st.writeBy(st.out, now.Add(writeSlack))
		st.renew = now.Add(checkEvery)
	}
}

// await waits for something that is newer than what the reader has. It reports
// false when the stream is to end: its time is over, the reader has gone, or it
// had better ask somebody else, as its next question will tell.
func (st *streaming) await(ctx context.Context) bool {
	for {
		changed := st.source.Changed()
		if st.at.passed(st.source.State()) {
			return true
		}
		select {
		case <-changed:
		case <-st.check.C:
			st.extend()
			if !st.lost && st.astray != nil && st.astray() {
				return false
			}
		case <-ctx.Done():
			return false
		}
	}
}

// messages are those of one state, each made once however many readers get it.
type messages struct {
	mu    sync.Mutex
	state *state.State
	made  map[wanted][]byte
}

// wanted is what a message is made for: a position, or any of them where it has
// all records.
type wanted struct {
	position
	full bool
}

// of returns what a reader at some position is sent of a state, with its end of
// line.
func (m *messages) of(s *state.State, at position, full bool) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != s {
		m.state, m.made = s, make(map[wanted][]byte)
	}
	if b := m.made[wanted{position: at}]; b != nil && !full {
		return b
	}
	records, all := s.Changes(at.store, at.index)
	key := wanted{position: at}
	if full || all { // the same for everybody, and large
		records, all, key = s.All(), true, wanted{full: true}
	}
	b := m.made[key]
	if b == nil {
		b = message{s.Store(), s.Index(), all, records}.encode()
	}
	if len(m.made) < maxMessages {
		m.made[key] = b
	}
	return b
}
