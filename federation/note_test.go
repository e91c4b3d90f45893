package federation

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// A moody primary answers when it is told to, and otherwise fails with another
// error each time.
type moody struct {
	asked atomic.Int64
	well  atomic.Bool
}

func (m *moody) RoundTrip(r *http.Request) (*http.Response, error) {
	n := m.asked.Add(1)
	if !m.well.Load() {
		return nil, fmt.Errorf("attempt %d came to nothing", n)
	}
	body := io.MultiReader(strings.NewReader(`{"store":"ONE","index":1,"full":true}`+"\n"), silence{r.Context()})
	return &http.Response{
		StatusCode: http.StatusOK, Request: r, Body: io.NopCloser(body), Header: http.Header{"Content-Type": {streamType}},
	}, nil
}

// silence reads as nothing until a context ends.
type silence struct{ context.Context }

func (s silence) Read([]byte) (int, error) {
	<-s.Done()
	return 0, s.Err()
}

// A primary that is away is told of at once, and every 30 s while it stays so,
// whatever each single error says.
func TestSilenceIsToldNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		primary := &moody{}
		r := NewReplica(ReplicaOptions{
			Client: NewClient(ClientOptions{Primary: "dc1", Domain: "consul", Transport: primary}),
			Log:    zap.New(core),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = r.Run(ctx)
		}()
		const away, back = "primary does not answer: going on with what is known", "primary answers"
		want := func(warnings, answers int) {
			t.Helper()
			synctest.Wait()
			if w, a := logs.FilterMessage(away).Len(), logs.FilterMessage(back).Len(); w != warnings || a != answers {
				t.Errorf("%v questions: %d warnings and %d answers are told, want %d and %d", primary.asked.Load(), w, a, warnings, answers)
			}
		}
		want(1, 0)
		time.Sleep(29 * time.Second)
		want(1, 0)
		time.Sleep(70 * time.Second)
		want(4, 0)
		if n := primary.asked.Load(); n < 40 {
			t.Errorf("only %d questions", n)
		}
		primary.well.Store(true)
		time.Sleep(3 * time.Second)
		want(4, 1)
		cancel()
		<-done
	})
}
