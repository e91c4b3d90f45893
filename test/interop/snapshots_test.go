package interop

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"

	"culvert/test/lab"
)

// Servers with TLS of their own cut off some snapshots (see [cutOff]): with Culvert
// between them no other ones, and no more.
func TestSnapshotsBind(t *testing.T) { require(t); testSnapshots(t, way{tls: true}) }

func TestSnapshotsPlainly(t *testing.T) {
	require(t)
	testSnapshots(t, way{redirect: true, plain: true, tls: true})
}

func testSnapshots(t *testing.T, w way) {
	const each = 100 // one after the other: raft drops all but the newest two while they are read
	f := newConsul(t, w)
	f.seeEachOther()
	var asked, lost int
	f.ways(func(from *consul, to []*consul) {
		for range each {
			asked++
			err := snapshot(from.Host, to[0].Site)
			switch {
			case err == nil:
			case cutOff.MatchString(err.Error()), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
				lost++ // an agent that has begun to answer by then can only stop
				t.Logf("%s: %v", from.Node, err)
			default:
				t.Errorf("%s: %v", from.Node, err)
			}
		}
	})
	t.Logf("%d of %d snapshots were cut off", lost, asked)
	if lost*20 > asked {
		t.Error("that is more than one in twenty")
	}
}

// snapshot asks the server on a host for a snapshot of a datacenter, and reads it to
// its end.
func snapshot(h *lab.Host, dc string) error {
	ctx, cancel := context.WithTimeout(context.Background(), settle)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:8500/v1/snapshot?dc="+dc, nil)
	if err != nil {
		return err
	}
	client := h.HTTP()
	client.Timeout = 0 // the context's
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(resp.Body)
		return errors.Join(fmt.Errorf("%s: %s", resp.Status, text), err)
	}
	archive, err := gzip.NewReader(resp.Body)
	if err == nil {
		_, err = io.Copy(io.Discard, archive)
	}
	return err
}
