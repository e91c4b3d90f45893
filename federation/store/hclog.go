package store

import (
	"fmt"
	"io"
	stdlog "log"
	"slices"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"culvert/internal/sample"
)

// An hcLog writes what raft logs. raft's errors are mostly that a peer cannot
// be reached, several times a second: here they are warnings, one in ten
// seconds a kind. What the store itself says of elections is enough: raft's
// own information is for debugging.
type hcLog struct {
	log     *zap.Logger
	name    string
	args    []any
	sampler *sample.Sampler
}

var _ hclog.Logger = (*hcLog)(nil)

func newHCLog(log *zap.Logger) *hcLog { return &hcLog{log: log, sampler: new(sample.Sampler)} }

// Log implements [hclog.Logger], as the following do.
func (h *hcLog) Log(level hclog.Level, msg string, args ...any) {
	to := zapcore.DebugLevel
	var fields []zap.Field
	if level >= hclog.Warn {
		to = zapcore.WarnLevel
		left, ok := h.sampler.Allow(msg)
		if !ok {
			return
		}
		fields = append(fields, zap.Int("suppressed", left))
	}
	e := h.log.Check(to, msg)
	if e == nil {
		return
	}
	args = append(slices.Clip(h.args), args...)
	for i := 0; i+1 < len(args); i += 2 {
		fields = append(fields, zap.String(fmt.Sprint(args[i]), format(args[i+1])))
	}
	e.Write(fields...)
}

func format(v any) string {
	if f, ok := v.(hclog.Format); ok && len(f) > 0 {
		if layout, ok := f[0].(string); ok {
			return fmt.Sprintf(layout, f[1:]...)
		}
	}
	return fmt.Sprint(v)
}

func (h *hcLog) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }
func (h *hcLog) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }
func (h *hcLog) Info(msg string, args ...any)  { h.Log(hclog.Info, msg, args...) }
func (h *hcLog) Warn(msg string, args ...any)  { h.Log(hclog.Warn, msg, args...) }
func (h *hcLog) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }

func (h *hcLog) IsTrace() bool         { return false }
func (h *hcLog) IsDebug() bool         { return h.log.Core().Enabled(zapcore.DebugLevel) }
func (h *hcLog) IsInfo() bool          { return h.IsDebug() }
func (h *hcLog) IsWarn() bool          { return true }
func (h *hcLog) IsError() bool         { return true }
func (h *hcLog) ImpliedArgs() []any    { return h.args }
func (h *hcLog) Name() string          { return h.name }
func (h *hcLog) SetLevel(hclog.Level)  {}
func (h *hcLog) GetLevel() hclog.Level { return hclog.Info }
func (h *hcLog) With(a ...any) hclog.Logger {
	c := *h
	c.args = append(slices.Clip(h.args), a...)
	return &c
}

func (h *hcLog) Named(name string) hclog.Logger {
	c := *h
	c.name, c.log = name, h.log.Named(name)
	return &c
}

func (h *hcLog) ResetNamed(name string) hclog.Logger { return h.Named(name) }

func (h *hcLog) StandardLogger(*hclog.StandardLoggerOptions) *stdlog.Logger {
	return stdlog.New(h.StandardWriter(nil), "", 0)
}

func (h *hcLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return hcWriter{h} }

type hcWriter struct{ h *hcLog }

func (w hcWriter) Write(p []byte) (int, error) {
	w.h.Warn(string(p))
	return len(p), nil
}
