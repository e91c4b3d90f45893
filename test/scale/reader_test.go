package scale

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A reader follows the store as a replica does, by the same requests over a
// connection of its own, and looks at the index of what comes and at nothing else.
// It does not keep records, so that thousands of them leave time for what is
// measured. It speaks HTTP/2 by itself, in one goroutine.
type reader struct {
	conn    *tls.Conn
	frames  *http2.Framer
	encoder *hpack.Encoder
	headers bytes.Buffer // of a request, as the encoder writes them
	stream  uint32       // of the question under way: clients have odd ones
	line    []byte       // of a message that has not come to its end
	store   string
	index   uint64
}

// newReader returns a reader that knows of a store up to an index.
func newReader(c *tls.Conn, store string, index uint64) *reader {
	r := &reader{conn: c, frames: http2.NewFramer(c, c), stream: 1, store: store, index: index}
	r.encoder = hpack.NewEncoder(&r.headers)
	r.encoder.SetMaxDynamicTableSizeLimit(1) // as culvert's own clients do
	r.frames.SetReuseFrames()
	return r
}

// window is more than the store ever sends in answer to one question here.
const window = 1 << 30

// run reads until ctx ends, and calls got for each message with the index that it
// has then.
func (r *reader) run(ctx context.Context, got func(index uint64)) error {
	defer context.AfterFunc(ctx, func() { _ = r.conn.Close() })()
	defer func() { _ = r.conn.Close() }()
	_, err := r.conn.Write([]byte(http2.ClientPreface))
	if err == nil {
		err = r.frames.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	}
	if err == nil {
		err = r.frames.WriteWindowUpdate(0, window)
	}
	for err == nil {
		err = r.ask()
		for over := false; err == nil && !over; {
			over, err = r.read(got)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// ask begins another stream.
func (r *reader) ask() error {
	r.stream += 2
	r.headers.Reset()
	for _, h := range [][2]string{
		{":method", "GET"},
		{":scheme", "https"},
		{":authority", "server.dc1.consul"},
		{":path", fmt.Sprintf("/v1/federation-states?changes&stream&store=%s&index=%d&wait=1m", r.store, r.index)},
	} {
		if err := r.encoder.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
			return err
		}
	}
	return r.frames.WriteHeaders(http2.HeadersFrameParam{
		StreamID: r.stream, BlockFragment: r.headers.Bytes(), EndStream: true, EndHeaders: true,
	})
}

// read takes one frame, and tells whether the stream is over.
func (r *reader) read(got func(index uint64)) (over bool, err error) {
	frame, err := r.frames.ReadFrame()
	if err != nil {
		return false, err
	}
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			err = r.frames.WriteSettingsAck()
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			err = r.frames.WritePing(true, f.Data)
		}
	case *http2.DataFrame:
		if err = r.take(f.Data(), got); err == nil && len(f.Data()) > 0 {
			err = r.frames.WriteWindowUpdate(0, uint32(len(f.Data())))
		}
		return f.StreamEnded(), err
	case *http2.RSTStreamFrame:
		err = fmt.Errorf("the stream was reset: %v", f.ErrCode)
	case *http2.GoAwayFrame:
		err = fmt.Errorf("the server sends the reader away: %v", f.ErrCode)
	}
	return false, err
}

// take reads the indices of the messages that end in some data.
func (r *reader) take(data []byte, got func(index uint64)) error {
	for {
		part, rest, ended := bytes.Cut(data, []byte("\n"))
		r.line = append(r.line, part...)
		if !ended {
			return nil
		}
		index, err := indexOf(r.line, r.store)
		if err != nil {
			return err
		}
		r.index, r.line, data = index, r.line[:0], rest
		got(index)
	}
}

// indexOf reads a message's index without its records.
func indexOf(line []byte, store string) (uint64, error) {
	name, _ := json.Marshal(store) //nolint:errchkjson // a string
	rest, ok := bytes.CutPrefix(line, []byte(`{"store":`+string(name)+`,"index":`))
	number, _, more := bytes.Cut(rest, []byte(","))
	if !ok || !more {
		return 0, errors.New("not a message: " + string(line[:min(len(line), 100)]))
	}
	return strconv.ParseUint(string(number), 10, 64)
}
