package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"

	"culvert/config"
)

// A process is a sidecar or a gateway, with a configuration of type C.
type process[C any] interface {
	Run(ctx context.Context) error
	Reload(cfg *C) error
}

// serve reads a configuration, makes a process of it, and runs it until ctx
// ends. SIGHUP reads the configuration again.
func serve[C any](
	ctx context.Context, f serveFlags,
	load func(file string, o config.Options) (*C, error),
	logging func(cfg *C) config.Log,
	start func(cfg *C, log *zap.Logger) (process[C], error),
) error {
	cfg, err := load(f.config, configOptions(f.over))
	if err != nil {
		return err
	}
	log, err := newLogger(logging(cfg))
	if err != nil {
		return err
	}
	p, err := start(cfg, log)
	if err != nil {
		return err
	}
	defer onHangup(log, func() error {
		cfg, err := load(f.config, configOptions(f.over))
		if err != nil {
			return err
		}
		return p.Reload(cfg)
	})()
	return p.Run(ctx)
}

// onHangup calls reload for each SIGHUP until the function that it returns is
// called. A reload that does not succeed is one error line, and the old state
// serves on.
func onHangup(log *zap.Logger, reload func() error) (stop func()) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range hup {
			if err := reload(); err != nil {
				log.Error("reload refused: the old configuration stays", zap.Error(err))
				continue
			}
			log.Info("reloaded")
		}
	}()
	return func() {
		signal.Stop(hup)
		close(hup)
		<-done
	}
}

// beside runs f until ctx ends or the function that it returns is called, which waits
// for f.
func beside(ctx context.Context, f func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

func newRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "culvert_build_info",
			Help:        "Always 1; the version is in the label.",
			ConstLabels: prometheus.Labels{"version": version},
		}, func() float64 { return 1 }),
	)
	return reg
}
