package main

import (
	"context"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"culvert/config"
	"culvert/internal/heap"
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

// gcPercent is how much a sidecar's heap may grow before garbage is collected, as long
// as that is seldom. Once it is connected it allocates next to nothing, and what the
// handshakes of a thousand peers leave need not stay until the heap has doubled.
const gcPercent = 50

func runSidecar(ctx context.Context, f serveFlags) error {
	defer beside(ctx, func(ctx context.Context) { heap.Pace(ctx, gcPercent) })()
	logging := func(cfg *config.Sidecar) config.Log { return cfg.Log }
	return serve(ctx, f, config.LoadSidecar, logging, func(cfg *config.Sidecar, log *zap.Logger) (process[config.Sidecar], error) {
		return sidecar.New(cfg, sidecar.Options{Log: log, Registry: newRegistry(), Version: version, Pprof: f.pprof})
	})
}
