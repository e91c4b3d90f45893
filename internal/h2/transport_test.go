package h2

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Any number of requests that wait share one connection, the first ones too,
// which ask before it is there.
func TestOneConnection(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		release := make(chan struct{})
		s.handler = until(release)
		slow := make(chan struct{})
		s.wait.Store(&slow)
		first := s.ask(t.Context(), 8)
		synctest.Wait()
		close(slow)
		synctest.Wait()
		second := s.ask(t.Context(), 8)
		synctest.Wait()
		time.Sleep(10 * time.Minute) // no limit but the callers' own
		s.wantDials(t, 1)
		close(release)
		for range 8 {
			for _, answers := range []<-chan answer{first, second} {
				if a := <-answers; a.body != "released" || a.err != nil {
					t.Errorf("got %+v", a)
				}
			}
		}
		s.wantDials(t, 1)
	})
}

// Where one connection is full there is another, and not a request that waits
// for a place.
func TestFullConnection(t *testing.T) {
	bubble(t, ServerOptions{MaxStreams: 2}, func(t *testing.T, s *site) {
		release := make(chan struct{})
		s.handler = until(release)
		var all []<-chan answer
		for range 5 { // one by one: the limit is known when the server has said it
			all = append(all, s.ask(t.Context(), 1))
			synctest.Wait()
		}
		s.wantDials(t, 3)
		close(release)
		for _, answers := range all {
			if a := <-answers; a.body != "released" || a.err != nil {
				t.Errorf("got %+v", a)
			}
		}
	})
}

// A connection whose far end is gone without a word is given up, and the next
// request dials.
func TestClientNoticesADeadConnection(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		release := make(chan struct{})
		s.handler = until(release)
		answers := s.ask(t.Context(), 2)
		synctest.Wait()
		_, far := s.last()
		start := time.Now()
		far.lost.Store(true)
		for range 2 {
			if a := <-answers; a.err == nil {
				t.Errorf("got %q", a.body)
			}
		}
		if d := time.Since(start); d > PingAfter+PingTimeout {
			t.Errorf("noticed after %v", d)
		}
		far.Abort() // or the server would notice after this
		close(release)
		s.want(t, "released")
		s.wantDials(t, 2)
	})
}

// Neither the idle limit, nor a connection that the server ends, nor
// CloseIdleConnections leaves a place taken.
func TestNextConnection(t *testing.T) {
	for name, end := range map[string]func(s *site){
		"idle":   func(*site) { time.Sleep(DefaultIdleConnTimeout + time.Second) },
		"closed": func(s *site) { s.client.CloseIdleConnections() },
		"reset": func(s *site) {
			near, _ := s.last()
			near.Abort()
		},
		"ended": func(s *site) {
			_, far := s.last()
			_ = far.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
				for i := range 4 {
					answers := s.ask(t.Context(), 3)
					for range 3 {
						if a := <-answers; a.body != "hello" || a.err != nil {
							t.Errorf("connection %d: %+v", i, a)
						}
					}
					s.wantDials(t, i+1)
					end(s)
					synctest.Wait()
				}
			})
		})
	}
}

// Each request that waits for a dial that fails is told, and none waits for ever.
func TestDialFails(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		refused := errors.New("no path")
		s.fail.Store(&refused)
		answers := s.ask(t.Context(), 3)
		for range 3 {
			if a := <-answers; !errors.Is(a.err, refused) {
				t.Errorf("got %+v", a)
			}
		}
		s.fail.Store(nil)
		s.want(t, "hello")
	})
}

func TestDialIsBounded(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		never := make(chan struct{})
		s.wait.Store(&never)
		start := time.Now()
		if _, err := s.get(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if d := time.Since(start); d != DefaultDialTimeout {
			t.Errorf("given up after %v", d)
		}
	})
}

// A request that is given up ends its wait, and not the dial.
func TestRequestIsGivenUp(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		slow := make(chan struct{})
		s.wait.Store(&slow)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.get(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		close(slow)
		synctest.Wait()
		s.wantDials(t, 1)
		s.want(t, "hello")
		s.wantDials(t, 1)
	})
}

// The handler of a request that is given up is told, and the connection stays.
func TestRequestIsCancelled(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		told := make(chan struct{})
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Wait") == "" {
				hello(w, r)
				return
			}
			<-r.Context().Done()
			close(told)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Wait", "1")
		if _, err := s.client.Do(r); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		<-told
		s.want(t, "hello")
		s.wantDials(t, 1)
	})
}

func TestOtherProtocol(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.clientTLS.NextProtos = []string{"other"}
		if _, err := s.get(t.Context()); err == nil || !strings.Contains(err.Error(), `negotiated "other", not h2`) {
			t.Errorf("error %v", err)
		}
		resp, err := s.client.Get("http://" + host + "/x")
		if err == nil {
			resp.Body.Close()
			t.Error("a request went out in the clear")
		}
	})
}

func TestResponseHeaderIsBounded(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Large", strings.Repeat("x", 2*MaxHeaderBytes))
			hello(w, r)
		}
		if body, err := s.get(t.Context()); err == nil {
			t.Errorf("got %q", body)
		}
	})
}
