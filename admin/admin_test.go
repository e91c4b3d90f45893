package admin

import (
	"context"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a Server on a free loopback port and returns its base URL.
func start(t *testing.T, o Options) string {
	t.Helper()
	o.Address = "127.0.0.1:0"
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not return within 5 s of its context's end")
		}
	})
	return "http://" + s.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestPaths(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "culvert_test_events_total", Help: "events"})
	reg.MustRegister(c)
	c.Add(3)
	var ready atomic.Bool
	base := start(t, Options{
		Gatherer: reg,
		Ready: func() Readiness {
			return All(Check{Name: "listener", OK: true}, Check{Name: "certificate", OK: ready.Load(), Detail: "expired"})
		},
		Status: func() any { return map[string]string{"kind": "sidecar"} },
	})

	if code, body := get(t, base+"/metrics"); code != 200 || !strings.Contains(body, "culvert_test_events_total 3") {
		t.Errorf("/metrics: %d %q", code, body)
	}
	if code, body := get(t, base+"/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
	code, body := get(t, base+"/readyz")
	if code != http.StatusServiceUnavailable {
		t.Errorf("/readyz with a failed check: %d", code)
	}
	var r Readiness
	if err := json.Unmarshal([]byte(body), &r); err != nil || r.Ready || len(r.Checks) != 2 || r.Checks[1].Detail != "expired" {
		t.Errorf("/readyz: %q, %v", body, err)
	}
	ready.Store(true)
	if code, _ := get(t, base+"/readyz"); code != 200 {
		t.Errorf("/readyz with every check passed: %d", code)
	}
	if code, body := get(t, base+"/v1/status"); code != 200 || !strings.Contains(body, `"kind": "sidecar"`) {
		t.Errorf("/v1/status: %d %q", code, body)
	}
	if code, _ := get(t, base+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("/debug/pprof/ without Pprof: %d, want 404", code)
	}
	if resp, err := http.Post(base+"/v1/status", "text/plain", nil); err != nil {
		t.Error(err)
	} else {
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST /v1/status: %d, want 405", resp.StatusCode)
		}
	}
}

func TestPprofIsOptIn(t *testing.T) {
	base := start(t, Options{Pprof: true})
	if code, _ := get(t, base+"/debug/pprof/"); code != 200 {
		t.Errorf("/debug/pprof/: %d", code)
	}
	if code, _ := get(t, base+"/v1/status"); code != http.StatusNotFound {
		t.Errorf("/v1/status without Status: %d, want 404", code)
	}
	if code, _ := get(t, base+"/readyz"); code != 200 {
		t.Errorf("/readyz without Ready: %d", code)
	}
}

func TestStatusThatCannotBeEncoded(t *testing.T) {
	base := start(t, Options{Status: func() any { return math.NaN() }})
	if code, body := get(t, base+"/v1/status"); code != http.StatusInternalServerError || !strings.Contains(body, "encode answer") {
		t.Errorf("/v1/status: %d %q", code, body)
	}
}

func TestAddressInUse(t *testing.T) {
	s, err := New(Options{Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := New(Options{Address: s.Addr().String()}); err == nil || !strings.Contains(err.Error(), "listen for admin requests") {
		t.Errorf("second listener on one address: %v", err)
	}
}
