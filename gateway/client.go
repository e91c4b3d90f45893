package gateway

import (
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"culvert/config"
	"culvert/federation"
	"culvert/internal/resolve"
	"culvert/locator"
)

// NewClient returns a client of the federation that a configuration belongs to,
// with the gateway's certificate and by its ways, and without a gateway. Close it
// with the function returned.
func NewClient(cfg *config.Gateway, log *zap.Logger) (_ *federation.Client, done func(), err error) {
	g := &Gateway{
		opts: Options{Log: log}, log: log, own: newOwn(&net.TCPAddr{}),
		resolver: resolve.New(resolve.Options{}), dials: locator.NewMetrics(nil),
	}
	f, err := g.newFederated(cfg, prometheus.NewRegistry())
	if err != nil {
		g.resolver.Close()
		return nil, nil, err
	}
	return f.client, func() {
		f.client.Close()
		g.resolver.Close()
	}, nil
}
