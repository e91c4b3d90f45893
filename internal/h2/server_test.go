package h2

import (
	"context"
	"crypto/tls"
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

	"culvert/internal/memnet"
)

// Whom a request is from is known by its connection.
func TestRequestKnowsItsPeer(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			id, err := s.creds.PeerIdentity(*r.TLS)
			if err != nil {
				t.Error(err)
			}
			_, _ = io.WriteString(w, r.Proto+" "+string(id.Role)+" "+id.String())
		}
		s.want(t, "HTTP/2.0 gateway dc2/gw1")
	})
}

// When a connection is told to go, what waits can answer, and the next request
// has a connection of its own.
func TestDismissed(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.handler = until(nil)
		answers := s.ask(t.Context(), 3)
		synctest.Wait()
		start := time.Now()
		s.stop()
		for range 3 {
			if a := <-answers; a.body != "stopped" || a.err != nil {
				t.Errorf("the request that waited got %+v", a)
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("answers after %v", d)
		}
		s.wg.Wait()
		if d := time.Since(start); d > time.Second {
			t.Errorf("the connection ended after %v", d)
		}
		s.wantDials(t, 1)
		s.ctx, s.stop = context.WithCancel(context.Background())
		s.handler = hello
		s.want(t, "hello")
		s.wantDials(t, 2)
	})
}

// What does not end is cut off, and ServeConn waits for its handler.
func TestCutOff(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		release := make(chan struct{})
		s.handler = func(http.ResponseWriter, *http.Request) { <-release }
		answers := s.ask(t.Context(), 1)
		synctest.Wait()
		_, far := s.last()
		far.Block() // not even the GOAWAY goes out
		start := time.Now()
		s.stop()
		if a := <-answers; a.err == nil {
			t.Errorf("got %q", a.body)
		}
		if d := time.Since(start); d != DefaultCloseTimeout {
			t.Errorf("cut off after %v", d)
		}
		returned := make(chan struct{})
		go func() { s.wg.Wait(); close(returned) }()
		synctest.Wait()
		select {
		case <-returned:
			t.Error("ServeConn returned before its handler")
		default:
		}
		close(release)
		<-returned
	})
}

func TestClose(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.handler = until(nil)
		answers := s.ask(t.Context(), 2)
		synctest.Wait()
		s.server.Close()
		synctest.Wait()
		s.wg.Wait() // at once: Close has waited
		for range 2 {
			if a := <-answers; a.body != "stopped" || a.err != nil {
				t.Errorf("the request that waited got %+v", a)
			}
		}
		if body, err := s.get(t.Context()); err == nil {
			t.Errorf("after Close: %q", body)
		}
		s.server.Close()
	})
}

// A connection that comes too late is closed and not served.
func TestContextEndedBefore(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.stop()
		if body, err := s.get(t.Context()); err == nil {
			t.Errorf("got %q", body)
		}
		start := time.Now()
		s.wg.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("ended after %v", d)
		}
	})
}

// One may also be told to go while net/http takes it up, at any point of that.
func TestDismissedAtOnce(t *testing.T) {
	for range 50 {
		bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
			near, far := memnet.Pipe()
			ready := make(chan struct{})
			go func() {
				c := tls.Client(near, s.clientTLS)
				_ = c.Handshake()
				close(ready)
				_, _ = io.Copy(io.Discard, c)
				_ = near.Close()
			}()
			c := tls.Server(far, s.serverTLS)
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			<-ready
			start := time.Now()
			go s.stop()
			s.server.ServeConn(s.ctx, c)
			if d := time.Since(start); d > DefaultCloseTimeout {
				t.Errorf("ended after %v", d)
			}
		})
	}
}

// serveRaw serves one connection and returns the client's end of it.
func (s *site) serveRaw(t *testing.T, protos ...string) (*tls.Conn, *memnet.Conn, <-chan struct{}) {
	t.Helper()
	near, far := memnet.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := tls.Server(far, s.serverTLS)
		if err := c.Handshake(); err != nil {
			t.Error(err)
			return
		}
		s.server.ServeConn(s.ctx, c)
	}()
	config := s.clientTLS.Clone()
	config.NextProtos = protos
	c := tls.Client(near, config)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	return c, far, done
}

func TestSilentClients(t *testing.T) {
	for name, c := range map[string]struct {
		say    string
		protos []string
		within time.Duration
	}{
		"nothing":       {"", []string{protocol}, 10 * time.Second},
		"no settings":   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []string{protocol}, 2 * time.Second},
		"HTTP/1":        {"GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n", []string{protocol}, 0},
		"another":       {"", []string{"other"}, 0},
		"none":          {"GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n", nil, 0},
		"http/1.1 only": {"GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n", []string{"http/1.1"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
				s.handler = func(http.ResponseWriter, *http.Request) { t.Error("a request was served") }
				client, far, done := s.serveRaw(t, c.protos...)
				start := time.Now()
				_, _ = io.WriteString(client, c.say)
				<-done
				if d := time.Since(start); d > c.within {
					t.Errorf("served for %v, want %v", d, c.within)
				}
				if _, err := far.Write([]byte("x")); err == nil {
					t.Error("the connection is open")
				}
				if name == "none" || name == "another" {
					if got, _ := io.ReadAll(client); len(got) > 0 {
						t.Errorf("answered %q", got)
					}
				}
			})
		})
	}
}

// A client that is gone without a word is noticed, and who waits for it told.
func TestServerNoticesADeadClient(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		ended := make(chan time.Time, 1)
		s.handler = func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			ended <- time.Now()
		}
		answers := s.ask(t.Context(), 1)
		synctest.Wait()
		near, _ := s.last()
		start := time.Now()
		near.lost.Store(true) // and what the server sends arrives, or the client would notice as well
		if d := (<-ended).Sub(start); d > PingAfter+PingTimeout {
			t.Errorf("noticed after %v", d)
		}
		s.wg.Wait() // the connection went with it
		<-answers
	})
}

func TestServerClosesIdleConnections(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		s.client.Transport.(*http.Transport).IdleConnTimeout = time.Hour
		s.want(t, "hello")
		start := time.Now()
		s.wg.Wait()
		if d := time.Since(start); d < DefaultIdleTimeout || d > DefaultIdleTimeout+2*time.Second {
			t.Errorf("closed after %v", d)
		}
		s.want(t, "hello")
		s.wantDials(t, 2)
	})
}

// A handler's panic costs its request alone, and is told.
func TestPanic(t *testing.T) {
	core, seen := observer.New(zapcore.WarnLevel)
	bubble(t, ServerOptions{Log: zap.New(core)}, func(t *testing.T, s *site) {
		release := make(chan struct{})
		var n atomic.Int32
		s.handler = func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1) == 2 {
				panic("spoilt")
			}
			until(release)(w, r)
		}
		answers := s.ask(t.Context(), 1)
		synctest.Wait()
		if body, err := s.get(t.Context()); err == nil {
			t.Errorf("got %q", body)
		}
		close(release)
		if a := <-answers; a.body != "released" || a.err != nil {
			t.Errorf("the other request got %+v", a)
		}
		s.wantDials(t, 1)
	})
	if all := seen.All(); len(all) != 1 || all[0].ContextMap()["panic"] != "spoilt" || all[0].ContextMap()["stack"] == "" {
		t.Errorf("logged %+v", all)
	}
}

func TestRequestHeaderIsBounded(t *testing.T) {
	bubble(t, ServerOptions{}, func(t *testing.T, s *site) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Large", strings.Repeat("x", 2*MaxHeaderBytes))
		if resp, err := s.client.Do(r); err == nil && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("answered %s", resp.Status)
		}
	})
}
