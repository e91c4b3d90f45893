package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"culvert/config"
	"culvert/sidecar"
)

func sidecarCommand() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "sidecar --config FILE",
		Short: "Run the sidecar of one server",
		Long: `Run the sidecar of one server: answer on the addresses of its peers, carry what
the server sends to their sidecars, and hand it what they send.

SIGHUP reads the configuration and the certificates again: peers, gateways and
datacenters change without a restart, and a file with faults changes nothing.
SIGTERM and SIGINT stop: open streams have a few seconds to end. A second one
ends the process at once.`,
		Example: `  culvert sidecar --config /etc/culvert/sidecar.hcl
  culvert sidecar --config sidecar.hcl --log-level debug --admin 127.0.0.1:7441`,
		RunE: func(cmd *cobra.Command, _ []string) error { return runSidecar(cmd.Context(), f) },
	}
	f.register(cmd)
	return cmd
}

func runSidecar(ctx context.Context, f serveFlags) error {
	load := func() (*config.Sidecar, error) { return config.LoadSidecar(f.config, configOptions(f.over)) }
	cfg, err := load()
	if err != nil {
		return err
	}
	log, err := newLogger(cfg.Log)
	if err != nil {
		return err
	}
	s, err := sidecar.New(cfg, sidecar.Options{Log: log, Registry: newRegistry(), Version: version, Pprof: f.pprof})
	if err != nil {
		return err
	}
	defer onHangup(log, func() error {
		cfg, err := load()
		if err != nil {
			return err
		}
		return s.Reload(cfg)
	})()
	return s.Run(ctx)
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
