package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"culvert/config"
)

func validateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE...",
		Short: "Check configuration files and print every fault",
		Long: `Check configuration files of sidecars and gateways, certificates included, and
print every fault with file, line and column. A file with a server block is a
sidecar's.

What only the host can tell is not checked: whether an address can be bound and
whether a port is in use.`,
		Example: `  culvert validate /etc/culvert/sidecar.hcl`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			var faults config.Faults
			for _, file := range files {
				line, err := validateFile(file)
				if more, ok := errors.AsType[config.Faults](err); ok {
					faults = append(faults, more...)
					continue
				}
				if err != nil {
					return err
				}
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: ok: %s\n", file, line); err != nil {
					return err
				}
			}
			if len(faults) > 0 {
				return faults
			}
			return nil
		},
	}
}

func validateFile(file string) (string, error) {
	kind, err := config.KindOf(file)
	if err != nil {
		return "", err
	}
	o := configOptions(config.Overrides{})
	if kind == config.KindGateway {
		g, err := config.LoadGateway(file, o)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("gateway %s/%s, %s, %s%s", g.Datacenter, g.Node,
			count(len(g.Sidecars), "sidecar"), count(len(g.Datacenters), "other datacenter"), standing(g.Datacenter, g.Federation)), nil
	}
	s, err := config.LoadSidecar(file, o)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("sidecar %s/%s, %s, %s, %s%s", s.Datacenter, s.Node,
		count(len(s.Services), "service"), count(len(s.Peers), "peer"), count(len(s.Gateways), "gateway"), standing(s.Datacenter, s.Federation)), nil
}

// standing tells what a datacenter is in its federation, if there is one: a
// mistyped name of the primary makes a secondary of it, without a fault.
func standing(datacenter string, f *config.Federation) string {
	switch {
	case f == nil:
		return ""
	case f.PrimaryDatacenter == datacenter:
		return ", primary of its federation"
	}
	return ", secondary of " + f.PrimaryDatacenter
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
