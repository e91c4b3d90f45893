package federation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
)

// A Source is a state that changes: the store's, or a replica's.
type Source interface {
	State() *state.State
	// Changed returns a channel that is closed at the next change. Asked for
	// before State, it misses none.
	Changed() <-chan struct{}
}

// The headers of an answer.
const (
	// IndexHeader is the index of the state that was answered from.
	IndexHeader = "X-Culvert-Index"
	// StoreHeader names the store that the index is of.
	StoreHeader = "X-Culvert-Store"
	// FullHeader is "true" where changes were asked for and all records
	// answer.
	FullHeader = "X-Culvert-Full"
)

// The time of a blocking query.
const (
	DefaultWait = time.Minute
	MaxWait     = 10 * time.Minute
)

// writeSlack is how long the bytes of an answer may take.
const writeSlack = 30 * time.Second

// reads answers questions about a state. Each waits, where it is told to, until
// there is something newer than the index that it names.
type reads struct {
	source Source
	log    *zap.Logger
	cache  messages
	// astray tells that the source may be behind for good, so that who asks
	// had better ask somebody else the next time. Nil means never.
	astray func() bool
}

// ReadHandler answers the paths of the API that change nothing, from a source.
// It asks for no certificate: that is done where connections are taken. A nil log
// means none.
func ReadHandler(source Source, log *zap.Logger) http.Handler {
	if log == nil {
		log = zap.NewNop()
	}
	mux := http.NewServeMux()
	(&reads{source: source, log: log.Named("federation")}).routes(mux)
	return mux
}

func (h *reads) routes(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/federation-states", h.all)
	mux.HandleFunc("GET /v1/federation-states/mesh-gateways", h.gateways)
	mux.HandleFunc("GET /v1/federation-state/{dc}", h.one)
}

// all answers with every record, or with what has changed since an index.
func (h *reads) all(w http.ResponseWriter, r *http.Request) {
	q, err := parseQuery(r)
	if err != nil {
		fail(w, http.StatusBadRequest, failure{Error: err.Error()})
		return
	}
	if q.changes && q.stream {
		h.stream(w, r, q)
		return
	}
	s := h.wait(w, r, q, func(s *state.State) bool { return s.Index() > q.index || q.named && q.store != s.Store() })
	if !q.changes {
		h.answer(w, r, s, func() []byte { return array(s.All()) })
		return
	}
	records, full := s.Changes(q.store, q.index)
	if differs(r, s, q) {
		records, full = s.All(), true
	}
	w.Header().Set(FullHeader, strconv.FormatBool(full))
	h.answer(w, r, s, func() []byte { return array(records) })
}

// differs tells whether a client that says what it has at this very index has
// something else. At another index nothing can be said: it gets the changes.
func differs(r *http.Request, s *state.State, q query) bool {
	has := r.Header.Get("If-None-Match")
	return has != "" && has != etag(s) && q.store == s.Store() && q.index == s.Index()
}

// gateways answers with every datacenter's gateways.
func (h *reads) gateways(w http.ResponseWriter, r *http.Request) {
	q, err := parseQuery(r)
	if err != nil {
		fail(w, http.StatusBadRequest, failure{Error: err.Error()})
		return
	}
	s := h.wait(w, r, q, func(s *state.State) bool { return s.Index() > q.index })
	out := make(map[string][]state.Gateway, s.Len())
	for _, record := range s.Records() {
		out[record.Datacenter] = append([]state.Gateway{}, record.Gateways...) // none are no null
	}
	body, err := json.Marshal(out)
	if err != nil {
		h.log.Error("encode gateways", zap.Error(err))
		fail(w, http.StatusInternalServerError, failure{Error: err.Error()})
		return
	}
	h.answer(w, r, s, func() []byte { return body })
}

// one answers with the record of one datacenter.
func (h *reads) one(w http.ResponseWriter, r *http.Request) {
	q, err := parseQuery(r)
	if err != nil {
		fail(w, http.StatusBadRequest, failure{Error: err.Error()})
		return
	}
	dc := r.PathValue("dc")
	s := h.wait(w, r, q, func(s *state.State) bool {
		record := s.Record(dc)
		return record == nil || record.Index > q.index
	})
	body := s.Raw(dc)
	if body == nil {
		h.head(w, s)
		fail(w, http.StatusNotFound, failure{Error: fmt.Sprintf("no datacenter %q is known", dc)})
		return
	}
	h.answer(w, r, s, func() []byte { return body })
}

func array(records []json.RawMessage) []byte {
	out := []byte{'['}
	for i, r := range records {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, r...)
	}
	return append(out, ']')
}

// A query is how a question is to be answered.
type query struct {
	index   uint64
	store   string
	named   bool // store was given; "" is what is no store's
	changes bool
	stream  bool
	wait    time.Duration // 0 does not wait
}

// parseQuery reads ?index=N&wait=60s&store=ID&changes&stream. Without an index,
// and with index 0, nothing is waited for, but a stream goes on.
func parseQuery(r *http.Request) (query, error) {
	values := r.URL.Query()
	q := query{
		store: values.Get("store"), named: values.Has("store"), changes: values.Has("changes"), stream: values.Has("stream"),
		wait: DefaultWait,
	}
	var err error
	if text := values.Get("index"); text != "" {
		if q.index, err = strconv.ParseUint(text, 10, 64); err != nil {
			return q, fmt.Errorf("index %q is no number: want one that an answer had in %s", text, IndexHeader)
		}
	}
	if text := values.Get("wait"); text != "" {
		if q.wait, err = time.ParseDuration(text); err != nil || q.wait < 0 {
			return q, fmt.Errorf("wait %q is no duration: want one such as 60s, %v at most", text, MaxWait)
		}
	}
	q.wait = min(q.wait, MaxWait)
	if q.index == 0 && !q.stream {
		q.wait = 0
	}
	return q, nil
}

// wait returns the state once it is due, or when the time is over. Those who
// wait for the same are spread a little at the end.
func (h *reads) wait(w http.ResponseWriter, r *http.Request, q query, due func(*state.State) bool) *state.State {
	limit := q.limit()
	// A server's own limit on an answer does not fit one that waits.
	h.writeBy(http.NewResponseController(w), time.Now().Add(limit+writeSlack))
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	for {
		changed := h.source.Changed()
		s := h.source.State()
		if due(s) || ctx.Err() != nil {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// limit is how long is waited for a question: those who ask together do not come
// back together.
func (q query) limit() time.Duration {
	if q.wait == 0 {
		return 0
	}
	return q.wait + rand.N(q.wait/16+1) //nolint:gosec // spreads load
}

// writeBy sets when what is being written has to have gone, zero for no limit.
func (h *reads) writeBy(w *http.ResponseController, at time.Time) {
	if err := w.SetWriteDeadline(at); err != nil && !errors.Is(err, http.ErrNotSupported) {
		h.log.Debug("set write deadline", zap.Error(err))
	}
}

func (h *reads) head(w http.ResponseWriter, s *state.State) {
	w.Header().Set(IndexHeader, strconv.FormatUint(s.Index(), 10))
	w.Header().Set(StoreHeader, s.Store())
	w.Header().Set("ETag", etag(s))
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if h.astray != nil && h.astray() {
		sendElsewhere(w)
	}
}

// sendElsewhere makes a client take another connection for its next request. In
// HTTP/2 it is a GOAWAY; what waits on the old one goes on.
func sendElsewhere(w http.ResponseWriter) { w.Header().Set("Connection", "close") }

// etag is of all records, whatever part of them is asked for.
func etag(s *state.State) string { return `"` + s.Hash() + `"` }

// answer sends a body, which is not made for those who have all of it.
func (h *reads) answer(w http.ResponseWriter, r *http.Request, s *state.State, body func() []byte) {
	h.head(w, s)
	if r.Header.Get("If-None-Match") == etag(s) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	_, _ = w.Write(body()) // the client has gone: nothing to do
}

// A failure is the body of an answer that is an error.
type failure struct {
	Error  string `json:"error"`
	Reason string `json:"reason,omitempty"`
	Holder string `json:"holder,omitempty"` // of what was claimed
}

func fail(w http.ResponseWriter, code int, f failure) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(f) // the client has gone: nothing to do
}
