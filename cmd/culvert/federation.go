package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"culvert/admin"
	"culvert/config"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/gateway"
	"culvert/sidecar"
)

func federationCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "federation",
		Short: "Show and change what a federation knows",
		Long: `Show and change what a federation knows: its datacenters, their gateways and
servers, and who keeps the store.

What shows asks a running sidecar or gateway on its admin address. What changes
something asks the primary datacenter, with the certificate of a configuration.`,
		Example: `  culvert federation list
  culvert federation get dc2 --json
  culvert federation leave --config /etc/culvert/sidecar.hcl`,
	}
	cmd.AddCommand(federationListCommand(), federationGetCommand(), federationGatewaysCommand(), federationPeersCommand(),
		federationLeaveCommand(), federationRemoveCommand(), federationRemovePeerCommand())
	return cmd
}

// A shown is a command that asks a running process and prints what it says.
type shown struct {
	addr   string
	asJSON bool
}

func (s *shown) register(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&s.addr, "admin", admin.DefaultAddress, "admin `ADDR` of the process")
	cmd.Flags().BoolVar(&s.asJSON, "json", false, "print the JSON as it was served")
	return cmd
}

// run prints the answer to a path, as it was served or as a table.
func (s *shown) run(cmd *cobra.Command, path string, table func(w io.Writer, body []byte) error) error {
	body, err := fetch(cmd.Context(), s.addr, path)
	if err != nil {
		return err
	}
	if s.asJSON {
		_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.TrimSpace(string(body)))
		return err
	}
	tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	if err := table(tw, body); err != nil {
		return unreachableError{fmt.Errorf("read what %s answered: %w", s.addr, err)}
	}
	return tw.Flush()
}

func federationListCommand() *cobra.Command {
	var s shown
	return s.register(&cobra.Command{
		Use:   "list",
		Short: "List the datacenters",
		Long:  `List the datacenters of the federation, with how many servers and gateways each has.`,
		Example: `  culvert federation list
  culvert federation list --admin 127.0.0.1:7441 --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "/v1/federation-states", printRecords)
		},
	})
}

func printRecords(w io.Writer, body []byte) error {
	var records []state.Record
	if err := json.Unmarshal(body, &records); err != nil {
		return err
	}
	row(w, "DATACENTER", "SERVERS", "CRITICAL", "GATEWAYS", "CRITICAL", "INDEX", "UPDATED")
	for _, r := range records {
		servers, gateways := 0, 0
		for _, s := range r.Servers {
			servers += critical(s.Health)
		}
		for _, g := range r.Gateways {
			gateways += critical(g.Health)
		}
		row(w, r.Datacenter, len(r.Servers), servers, len(r.Gateways), gateways, r.Index, r.UpdatedAt.Format(time.RFC3339))
	}
	return nil
}

func critical(h state.Health) int {
	if h == state.Critical {
		return 1
	}
	return 0
}

func federationGetCommand() *cobra.Command {
	var s shown
	return s.register(&cobra.Command{
		Use:   "get DATACENTER",
		Short: "Show one datacenter",
		Long:  `Show the servers and the gateways of one datacenter, as they have registered themselves.`,
		Example: `  culvert federation get dc2
  culvert federation get dc2 --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.run(cmd, "/v1/federation-state/"+url.PathEscape(args[0]), printRecord)
		},
	})
}

func printRecord(w io.Writer, body []byte) error {
	var r state.Record
	if err := json.Unmarshal(body, &r); err != nil {
		return err
	}
	row(w, "SERVER", "ADVERTISE", "SIDECAR", "SERVICES", "VERSION", "HEALTH", "SINCE")
	for _, s := range r.Servers {
		var services []string
		for _, sv := range s.Services {
			services = append(services, fmt.Sprintf("%s:%d", sv.Name, sv.Port))
		}
		row(w, s.Node, s.Advertise, s.Address, strings.Join(services, ","), orDash(s.Version), s.Health, s.Since.Format(time.RFC3339))
	}
	row(w)
	return printGateways(w, map[string][]state.Gateway{r.Datacenter: r.Gateways})
}

func federationGatewaysCommand() *cobra.Command {
	var s shown
	return s.register(&cobra.Command{
		Use:     "gateways",
		Short:   "List the gateways of all datacenters",
		Long:    `List the gateways of all datacenters, with what their own datacenter dials and what the others do.`,
		Example: `  culvert federation gateways`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "/v1/federation-states/mesh-gateways", func(w io.Writer, body []byte) error {
				var all map[string][]state.Gateway
				if err := json.Unmarshal(body, &all); err != nil {
					return err
				}
				return printGateways(w, all)
			})
		},
	})
}

func printGateways(w io.Writer, all map[string][]state.Gateway) error {
	row(w, "GATEWAY", "DATACENTER", "ADDRESS", "WAN ADDRESS", "VERSION", "HEALTH", "SINCE")
	for _, dc := range slices.Sorted(maps.Keys(all)) {
		for _, g := range all[dc] {
			row(w, g.Name, dc, g.Address, g.WANAddress, orDash(g.Version), g.Health, g.Since.Format(time.RFC3339))
		}
	}
	return nil
}

func federationPeersCommand() *cobra.Command {
	var s shown
	return s.register(&cobra.Command{
		Use:     "peers",
		Short:   "List who keeps the store",
		Long:    `List the sidecars of the primary datacenter that keep the store. Ask one of them: elsewhere nobody votes.`,
		Example: `  culvert federation peers`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "/v1/federation-peers", func(w io.Writer, body []byte) error {
				var a federation.PeersAnswer
				if err := json.Unmarshal(body, &a); err != nil {
					return err
				}
				row(w, "NODE", "ADDRESS", "VOTER", "LEADER")
				for _, p := range a.Peers {
					row(w, p.Node, p.Address, p.Voter, p.Leader)
				}
				return nil
			})
		},
	})
}

// A changed is a command that asks the primary with a configuration's certificate.
type changed struct{ config string }

func (c *changed) register(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&c.config, "config", "", "configuration `FILE` (required)")
	return cmd
}

const changeTimeout = 30 * time.Second

// run reads the configuration and gives change a client and who it is.
func (c *changed) run(cmd *cobra.Command, change func(ctx context.Context, client *federation.Client, self state.Key) error) error {
	if c.config == "" {
		return usageError{errors.New("--config is missing"), cmd.CommandPath() + " --config FILE"}
	}
	client, self, done, err := clientOf(c.config)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(cmd.Context(), changeTimeout)
	defer cancel()
	if err := change(ctx, client, self); err != nil {
		return primaryError{err}
	}
	return nil
}

type primaryError struct{ err error }

func (e primaryError) Error() string { return e.err.Error() }
func (e primaryError) Unwrap() error { return e.err }
func (e primaryError) Hint() string {
	if answer, ok := errors.AsType[*federation.AnswerError](e.err); ok && answer.Code == http.StatusForbidden {
		return "give the configuration of the entry's owner, or of a server of the primary datacenter"
	}
	return "is the primary datacenter up, and does `culvert status` show the way to it?"
}

type noFederationError struct{ file string }

func (e noFederationError) Error() string { return e.file + " has no federation block" }
func (e noFederationError) ExitCode() int { return exitUsage }
func (e noFederationError) Hint() string {
	return "give the configuration of a sidecar or gateway that has one"
}

func clientOf(file string) (*federation.Client, state.Key, func(), error) {
	kind, err := config.KindOf(file)
	if err != nil {
		return nil, state.Key{}, nil, err
	}
	if kind == config.KindGateway {
		cfg, err := config.LoadGateway(file, configOptions(config.Overrides{}))
		if err == nil && cfg.Federation == nil {
			err = noFederationError{file}
		}
		if err != nil {
			return nil, state.Key{}, nil, err
		}
		c, done, err := gateway.NewClient(cfg, zap.NewNop())
		return c, state.Key{Datacenter: cfg.Datacenter, Kind: state.KindGateway, Name: cfg.Node}, done, err
	}
	cfg, err := config.LoadSidecar(file, configOptions(config.Overrides{}))
	if err == nil && cfg.Federation == nil {
		err = noFederationError{file}
	}
	if err != nil {
		return nil, state.Key{}, nil, err
	}
	c, done, err := sidecar.NewClient(cfg, zap.NewNop())
	return c, state.Key{Datacenter: cfg.Datacenter, Kind: state.KindServer, Name: cfg.Node}, done, err
}

func federationLeaveCommand() *cobra.Command {
	var c changed
	return c.register(&cobra.Command{
		Use:   "leave --config FILE",
		Short: "Take the own entry out of the federation",
		Long: `Take the entry of the sidecar or gateway that the configuration is of out of the
federation: its peers forget it at once, instead of refusing what is for it. The
process goes on, and does not come back by itself; it does when it is started
again. Stopping it is no farewell: do this first where a server goes for good.`,
		Example: `  culvert federation leave --config /etc/culvert/sidecar.hcl`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.run(cmd, func(ctx context.Context, client *federation.Client, self state.Key) error {
				if err := client.Remove(ctx, self); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s has left the federation\n", self)
				return err
			})
		},
	})
}

func federationRemoveCommand() *cobra.Command {
	var c changed
	var isGateway bool
	cmd := c.register(&cobra.Command{
		Use:   "remove DATACENTER/NAME --config FILE",
		Short: "Take another's entry out of the federation",
		Long: `Take the entry of a server, or of a gateway, that has gone for good out of the
federation. That is for servers of the primary datacenter; the configuration is of
one of these. Nothing is to be done for one that only restarts.`,
		Example: `  culvert federation remove dc2/bob --config /etc/culvert/sidecar.hcl
  culvert federation remove dc2/gw1 --gateway --config /etc/culvert/sidecar.hcl`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dc, name, ok := strings.Cut(args[0], "/")
			if !ok || dc == "" || name == "" {
				return usageError{fmt.Errorf("%q is not DATACENTER/NAME", args[0]), "such as dc2/bob"}
			}
			k := state.Key{Datacenter: dc, Kind: state.KindServer, Name: name}
			if isGateway {
				k.Kind = state.KindGateway
			}
			return c.run(cmd, func(ctx context.Context, client *federation.Client, _ state.Key) error {
				if err := client.Remove(ctx, k); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s is not in the federation any more\n", k)
				return err
			})
		},
	})
	cmd.Flags().BoolVar(&isGateway, "gateway", false, "the name is a gateway's")
	return cmd
}

func federationRemovePeerCommand() *cobra.Command {
	var c changed
	return c.register(&cobra.Command{
		Use:   "remove-peer NODE --config FILE",
		Short: "Take a dead sidecar out of those that keep the store",
		Long: `Take a sidecar of the primary datacenter that will not come back out of those
that keep the store, so that it does not count in their votes any more. One that
leaves the federation goes by itself.`,
		Example: `  culvert federation remove-peer amy --config /etc/culvert/sidecar.hcl`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.run(cmd, func(ctx context.Context, client *federation.Client, _ state.Key) error {
				if err := client.RemovePeer(ctx, args[0]); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s does not keep the store any more\n", args[0])
				return err
			})
		},
	})
}
