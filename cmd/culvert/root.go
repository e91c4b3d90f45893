package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"culvert/config"
)

// version is what --version, the status and the metrics say.
const version = "0.1.0"

// Exit codes.
const (
	exitOK      = 0
	exitRuntime = 1
	exitUsage   = 2 // wrong usage or configuration
)

// run executes one command line and returns the exit code. It is all of main
// that a test can call.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	report(stderr, err)
	if coder, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		return coder.ExitCode()
	}
	return exitRuntime
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "culvert",
		Short: "Federate unmodified gossip and RPC servers across datacenters",
		Long: `Culvert is a sidecar that lets servers built on gossip and RPC (serf, Consul,
Nomad, anything on hashicorp/memberlist) federate between datacenters through
gateways, with mutual TLS, without one changed line in the server.

Run one sidecar beside each server and one gateway or more at the edge of each
datacenter.`,
		Example: `  culvert tls ca create
  culvert tls cert create --server --dc dc1 --node alice
  culvert validate sidecar.hcl
  culvert sidecar --config sidecar.hcl
  culvert status`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetVersionTemplate("culvert {{.Version}}\n")
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{err, fmt.Sprintf("see `%s --help`", cmd.CommandPath())}
	})
	root.AddCommand(sidecarCommand(), gatewayCommand(), validateCommand(), statusCommand(), explainCommand(), captureCommand(), federationCommand(), tlsCommand())
	markUsage(root)
	return root
}

// markUsage makes wrong arguments of every command a usageError, as wrong
// flags are.
func markUsage(cmd *cobra.Command) {
	args := cmd.Args
	if args == nil {
		args = cobra.ArbitraryArgs
		if !cmd.HasSubCommands() {
			args = cobra.NoArgs
		}
	}
	cmd.Args = func(cmd *cobra.Command, given []string) error {
		if err := args(cmd, given); err != nil {
			return usageError{err, fmt.Sprintf("see `%s --help`", cmd.CommandPath())}
		}
		return nil
	}
	if cmd.HasSubCommands() && cmd.RunE == nil {
		cmd.RunE = func(cmd *cobra.Command, given []string) error {
			if len(given) == 0 {
				return cmd.Help()
			}
			err := fmt.Errorf("unknown command %q for %q", given[0], cmd.CommandPath())
			hint := fmt.Sprintf("see `%s --help`", cmd.CommandPath())
			cmd.SuggestionsMinimumDistance = 2
			if near := cmd.SuggestionsFor(given[0]); len(near) > 0 {
				hint = fmt.Sprintf("did you mean `%s %s`?", cmd.CommandPath(), near[0])
			}
			return usageError{err, hint}
		}
	}
	for _, sub := range cmd.Commands() {
		markUsage(sub)
	}
}

// A usageError is a command line that could not be understood.
type usageError struct {
	err  error
	hint string
}

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }
func (e usageError) Hint() string  { return e.hint }
func (e usageError) ExitCode() int { return exitUsage }

// report prints an error for people: what is wrong, and what to do about it
// where that is known. Faults of a configuration are printed as they are, one
// a line, so that editors can jump to them.
func report(w io.Writer, err error) {
	if faults, ok := errors.AsType[config.Faults](err); ok {
		_, _ = fmt.Fprintln(w, faults.Error())
		return
	}
	for _, one := range flatten(err) {
		_, _ = fmt.Fprintf(w, "culvert: error: %v\n", one)
		if hinter, ok := errors.AsType[interface {
			error
			Hint() string
		}](one); ok && hinter.Hint() != "" {
			_, _ = fmt.Fprintf(w, "culvert: hint: %s\n", hinter.Hint())
		}
	}
}

// flatten returns the errors that errors.Join put together.
func flatten(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error }) // only a join at the very top is taken apart
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}
