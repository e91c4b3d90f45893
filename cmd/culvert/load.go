package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"culvert/certs"
	"culvert/config"
)

// serveFlags are the flags that `culvert sidecar` and `culvert gateway` share.
// Each that is given wins over the file.
type serveFlags struct {
	config string
	pprof  bool
	over   config.Overrides
}

func (f *serveFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.config, "config", "", "configuration `FILE` (required)")
	fl.StringVar(&f.over.Listen, "listen", "", "listen on `ADDR` instead of listen.address")
	fl.StringVar(&f.over.Admin, "admin", "", "serve metrics, health and status on `ADDR` instead of admin.address")
	fl.StringVar(&f.over.LogLevel, "log-level", "", "`LEVEL` instead of log.level: debug, info, warn or error")
	fl.StringVar(&f.over.LogFormat, "log-format", "", "`FORMAT` instead of log.format: json or console")
	fl.BoolVar(&f.pprof, "pprof", false, "serve profiles under /debug/pprof on the admin address")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if f.config == "" {
			return usageError{errors.New("--config is missing"), cmd.CommandPath() + " --config FILE"}
		}
		return nil
	}
}

// configOptions are what reading a configuration needs of the process. Every
// command that reads one uses these, so that all tell the same faults in the
// same words.
func configOptions(over config.Overrides) config.Options {
	return config.Options{
		Env:       os.LookupEnv,
		Hostname:  os.Hostname,
		CheckTLS:  checkTLS,
		Overrides: over,
	}
}

func checkTLS(ca, cert, key, datacenter, node, domain, role string) []config.TLSProblem {
	want := certs.Identity{Datacenter: datacenter, Node: node, Role: certs.Role(role)}
	var out []config.TLSProblem
	for _, p := range certs.Check(ca, cert, key, want, domain) {
		out = append(out, config.TLSProblem{Field: p.Field, Summary: p.Summary, Hint: p.Hint})
	}
	return out
}
