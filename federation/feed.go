package federation

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"culvert/federation/state"
)

// streamTimeout is how long the first message of a stream may take: all records
// of a large federation take a while on a slow line. It is also how much later than it
// was asked to a stream may end.
const streamTimeout = requestTimeout + writeSlack

var (
	errLate     = errors.New("no answer in time")
	errNoStream = errors.New("the primary's answer is no stream")
)

// A feed is a stream of the primary that is being read, by one goroutine.
type feed struct {
	host   string
	body   io.ReadCloser
	in     *bufio.Reader
	ctx    context.Context // of the request
	cancel context.CancelCauseFunc
	late   *time.Timer   // ends the request
	rest   time.Duration // that the stream may take after its first message, 0 from then on
}

// stream asks for what has changed since a state, and for what changes from then
// on, for as long as wait. Where the primary is at the same index and has other
// records it sends all of them. Who gets the stream closes it.
func (c *Client) stream(ctx context.Context, s *state.State, wait time.Duration) (*feed, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	f := &feed{
		host: strings.TrimPrefix(c.any, "https://"), ctx: ctx, cancel: cancel,
		late: time.AfterFunc(streamTimeout, func() { cancel(errLate) }), rest: wait + wait/16 + streamTimeout,
	}
	q := url.Values{"changes": {""}, "stream": {""}, "store": {s.Store()}, "wait": {wait.String()}}
	q.Set("index", strconv.FormatUint(s.Index(), 10))
	resp, err := c.send(ctx, http.MethodGet, c.any+"/v1/federation-states?"+q.Encode(), nil, http.Header{"If-None-Match": {etag(s)}})
	if err != nil {
		f.close()
		return nil, f.explain(err)
	}
	f.body, f.in = resp.Body, bufio.NewReader(resp.Body)
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody)) // what there is of it
		f.close()
		return nil, answerError(resp.StatusCode, b)
	}
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind != streamType {
		f.close()
		return nil, errNoStream
	}
	return f, nil
}

// next waits for a message. Its error is [io.EOF] when the primary has ended the
// stream between two.
func (f *feed) next() (message, error) {
	line, err := f.line()
	switch begun := f.rest == 0; {
	case errors.Is(err, io.EOF) && begun:
		return message{}, io.EOF
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	var m message
	if err == nil {
		err = json.Unmarshal(line, &m)
	}
	if err != nil {
		return message{}, f.explain(fmt.Errorf("read answer of %s: %w", f.host, err))
	}
	if f.rest > 0 {
		f.late.Reset(f.rest)
		f.rest = 0
	}
	return m, nil
}

// line reads a message, which is bounded.
func (f *feed) line() ([]byte, error) {
	var line []byte
	for {
		part, err := f.in.ReadSlice('\n')
		if len(line)+len(part) > maxAnswer {
			return nil, errTooLong
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line, nil
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// explain tells of lateness what it is: the request was given up for it.
func (f *feed) explain(err error) error {
	if errors.Is(context.Cause(f.ctx), errLate) {
		return fmt.Errorf("ask %s: %w", f.host, errLate)
	}
	return err
}

// close gives the stream up.
func (f *feed) close() {
	f.late.Stop()
	f.cancel(context.Canceled)
	if f.body != nil {
		_ = f.body.Close()
	}
}
