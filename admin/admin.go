// Package admin serves what an operator asks a running process: its metrics,
// whether it is alive, whether it is ready, and what it is doing.
//
//	srv, err := admin.New(admin.Options{
//		Address:  "127.0.0.1:7440",
//		Gatherer: registry,
//		Ready:    func() admin.Readiness { return state.Readiness() },
//		Status:   func() any { return state.Status() },
//	})
//	if err != nil { ... }
//	err = srv.Run(ctx)
//
// Paths:
//
//	GET /metrics      Prometheus text format
//	GET /healthz      200 while the process answers at all
//	GET /readyz       200 when ready, 503 when not; JSON with the reasons
//	GET /v1/status    JSON, its shape is the caller's
//	GET /debug/pprof  only with Options.Pprof
//
// Ready and Status are called from many goroutines at once and must not block.
// A process stops its Server last, so that /healthz and /readyz answer all
// through a drain. There is no authentication: the address is a loopback one
// unless the operator decides otherwise, and nothing here changes state.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// DefaultAddress is where a Server listens when Options.Address is empty.
const DefaultAddress = "127.0.0.1:7440"

// The time budgets of one request. WriteTimeout is as long as it is because a
// CPU profile takes 30 s by default.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 60 * time.Second
	idleTimeout       = 60 * time.Second
	shutdownTimeout   = time.Second
	maxHeaderBytes    = 16 << 10
)

// A Check is one condition of readiness.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// Readiness is the answer of /readyz. Ready decides the HTTP status; Checks
// say why; Details may hold anything that is worth reading but does not decide,
// such as the state of each peer.
type Readiness struct {
	Ready   bool    `json:"ready"`
	Checks  []Check `json:"checks"`
	Details any     `json:"details,omitempty"`
}

// All returns a Readiness that is ready when every check is OK.
func All(checks ...Check) Readiness {
	r := Readiness{Ready: true, Checks: checks}
	for _, c := range checks {
		r.Ready = r.Ready && c.OK
	}
	return r
}

// Options configure a Server.
type Options struct {
	// Address is the TCP address to listen on, host:port. Empty means
	// [DefaultAddress].
	Address string
	// Gatherer feeds /metrics. Nil serves an empty page.
	Gatherer prometheus.Gatherer
	// Ready answers /readyz. Nil means always ready.
	Ready func() Readiness
	// Status answers /v1/status; what it returns is encoded as JSON. Nil means
	// that the path does not exist.
	Status func() any
	// Handlers are further paths, by patterns of [http.ServeMux].
	Handlers map[string]http.Handler
	// Pprof adds /debug/pprof. Profiles tell much about a process, so they are
	// off unless asked for.
	Pprof bool
	// Log receives what goes wrong. Nil means no log.
	Log *zap.Logger
}

// A Server is the admin HTTP listener of one process.
type Server struct {
	ln   net.Listener
	http *http.Server
	log  *zap.Logger
}

// New binds the address, so that Addr answers at once, and returns a Server
// that serves when Run is called. A Server that is never run is given up with
// Close.
func New(o Options) (*Server, error) {
	if o.Address == "" {
		o.Address = DefaultAddress
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	log := o.Log.Named("admin")
	ln, err := net.Listen("tcp", o.Address)
	if err != nil {
		return nil, fmt.Errorf("listen for admin requests: %w", err)
	}
	return &Server{
		ln:  ln,
		log: log,
		http: &http.Server{
			Handler:           newHandler(o, log),
			ReadHeaderTimeout: readHeaderTimeout,
			ReadTimeout:       readTimeout,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    maxHeaderBytes,
			ErrorLog:          zap.NewStdLog(log),
		},
	}, nil
}

// Addr is the address that the Server listens on.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Close gives up a Server that was never run.
func (s *Server) Close() error { return s.ln.Close() }

// Run serves until ctx ends, then lets requests in flight finish for up to a
// second. It returns nil after a clean stop and the listener's error otherwise.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.shutdown()
	})
	err := s.http.Serve(s.ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve admin requests: %w", err)
}

func (s *Server) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		s.log.Debug("admin requests cut off", zap.Error(err))
		_ = s.http.Close() // the listener is closed already; nothing to learn
	}
}

func newHandler(o Options, log *zap.Logger) http.Handler {
	gatherer := o.Gatherer
	if gatherer == nil {
		gatherer = prometheus.NewRegistry()
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{ErrorLog: zap.NewStdLog(log)}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n")) // the client has gone: nothing to do
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		r := All()
		if o.Ready != nil {
			r = o.Ready()
		}
		code := http.StatusOK
		if !r.Ready {
			code = http.StatusServiceUnavailable
		}
		writeJSON(w, code, r, log)
	})
	if o.Status != nil {
		mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, o.Status(), log)
		})
	}
	for pattern, h := range o.Handlers {
		mux.Handle(pattern, h)
	}
	if o.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

func writeJSON(w http.ResponseWriter, code int, v any, log *zap.Logger) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		log.Error("encode answer", zap.Error(err))
		http.Error(w, "encode answer: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // the client has gone: nothing to do
}
