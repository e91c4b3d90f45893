package main

import (
	"context"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"culvert/config"
	"culvert/gateway"
	"culvert/internal/procs"
)

func gatewayCommand() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "gateway --config FILE",
		Short: "Run a gateway at the edge of a datacenter",
		Long: `Run a gateway at the edge of a datacenter: read the server name of each TLS
connection and pass its bytes on, to a sidecar of this datacenter or to the
gateways of another. A gateway holds no key for what it carries.

SIGHUP reads the configuration again: sidecars and datacenters change without a
restart, and a file with faults changes nothing. SIGTERM and SIGINT stop: open
streams have a few seconds to end. A second one ends the process at once.`,
		Example: `  culvert gateway --config /etc/culvert/gateway.hcl`,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runGateway(cmd.Context(), f) },
	}
	f.register(cmd)
	return cmd
}

func runGateway(ctx context.Context, f serveFlags) error {
	logging := func(cfg *config.Gateway) config.Log { return cfg.Log }
	return serve(ctx, f, config.LoadGateway, logging, func(cfg *config.Gateway, log *zap.Logger) (process[config.Gateway], error) {
		g, err := gateway.New(cfg, gateway.Options{Log: log, Registry: newRegistry(), Version: version, Pprof: f.pprof})
		if err != nil {
			return nil, err
		}
		return &frugal{Gateway: g, federated: cfg.Federation != nil}, nil
	})
}

// bulkPerLook is what is passed on in a tenth of a second where it is much: 2 Gbit/s.
const bulkPerLook = 25 << 20

// frugal is a gateway on no more processors than its load needs.
type frugal struct {
	*gateway.Gateway

	federated bool
	spliced   int64 // when it was looked at last
}

// Run runs the gateway.
func (f *frugal) Run(ctx context.Context) error {
	defer beside(ctx, func(ctx context.Context) { procs.Follow(ctx, f.processors) })()
	return f.Gateway.Run(ctx)
}

// processors is how many there are to be at the least. One will do where all that a
// gateway does is short. Reading the records of a federation is not. And loops that
// pass on much, each on one of its own, save more than a second one costs.
func (f *frugal) processors() int {
	before := f.spliced
	f.spliced = f.Spliced()
	if f.federated || f.spliced-before >= bulkPerLook {
		return 2
	}
	return 1
}
