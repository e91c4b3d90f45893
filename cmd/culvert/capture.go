package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"culvert/capture/ruleset"
)

func captureCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "capture",
		Short: "Show and clear the rules of capture = \"redirect\"",
		Long: `Show and clear the rules of capture = "redirect" in this network namespace.

They outlive a sidecar: what is for a peer is refused while no sidecar runs, and
an address is refused after its peer has left. Only on_exit = "open" and
'culvert capture clear' let such traffic go its plain way.`,
		Example: `  culvert capture show
  culvert capture clear`,
	}
	cmd.AddCommand(captureShowCommand(), captureClearCommand())
	return cmd
}

// A rules is one table as it is shown.
type rules struct {
	Table   string         `json:"table"`
	Running bool           `json:"running"` // a sidecar holds it
	Damaged bool           `json:"damaged"`
	Peers   []capturedPeer `json:"peers"`
	Lost    []lostPeer     `json:"lost"`
}

type capturedPeer struct {
	Name     string     `json:"name"`
	Address  netip.Addr `json:"address"`
	Endpoint netip.Addr `json:"endpoint"`
}

type lostPeer struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
}

func captureShowCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show whose traffic is captured and what is refused",
		Long: `Show, for each sidecar's table, the peers whose traffic is captured, their
endpoints, and the addresses that are refused because their peers have left.`,
		Example: `  culvert capture show
  culvert capture show --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := readRules()
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(all)
			}
			return printRules(cmd.OutOrStdout(), all)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func readRules() ([]rules, error) {
	all := []rules{}
	ports, err := ruleset.Tables()
	if err != nil {
		return nil, err
	}
	for _, port := range ports {
		t, err := ruleset.Find(port)
		if errors.Is(err, ruleset.ErrNoTable) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		state, err := t.Read()
		if err != nil && !errors.Is(err, ruleset.ErrDamaged) {
			return nil, err
		}
		r := rules{Table: t.Name(), Running: ruleset.IsHeld(port), Damaged: err != nil, Peers: []capturedPeer{}, Lost: []lostPeer{}}
		for _, at := range slices.SortedFunc(maps.Keys(state.Peers), netip.Addr.Compare) {
			r.Peers = append(r.Peers, capturedPeer{state.Peers[at].Name, at, state.Peers[at].Endpoint})
		}
		for _, at := range slices.SortedFunc(maps.Keys(state.Lost), netip.Addr.Compare) {
			r.Lost = append(r.Lost, lostPeer{state.Lost[at], at})
		}
		all = append(all, r)
	}
	return all, nil
}

func printRules(w io.Writer, all []rules) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "no rules of culvert in this network namespace")
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, r := range all {
		if i > 0 {
			row(tw)
		}
		what := "no sidecar runs: all of this is refused"
		if r.Running {
			what = "a sidecar runs"
		}
		if r.Damaged {
			what += "; somebody has changed it"
		}
		_, _ = fmt.Fprintf(tw, "table %s, %s\n", r.Table, what)
		row(tw, "ADDRESS", "PEER", "ENDPOINT")
		for _, p := range r.Peers {
			row(tw, p.Address, orDash(p.Name), p.Endpoint)
		}
		for _, l := range r.Lost {
			row(tw, l.Address, orDash(l.Name), "refused: the peer has left")
		}
	}
	return tw.Flush()
}

func captureClearCommand() *cobra.Command {
	var table string
	var all bool
	cmd := &cobra.Command{
		Use:   "clear [ADDRESS...]",
		Short: "Let traffic go its plain way again",
		Long: `Take away the rules that a sidecar has left behind, so that the server's traffic
leaves as it did before. While the sidecar runs it needs them: stop it first.

With addresses, stop refusing these alone, of peers that have left. That works
while the sidecar runs.

It needs CAP_NET_ADMIN. A unit that shall fail open calls it in ExecStopPost, as
on_exit = "open" does not see a crash.`,
		Example: `  culvert capture clear
  culvert capture clear --table culvert_8443
  culvert capture clear 10.2.0.9`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ports, err := tablesToClear(table, all)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				return clearAddresses(cmd.OutOrStdout(), ports, args)
			}
			return clearTables(cmd.OutOrStdout(), ports)
		},
	}
	cmd.Args = cobra.ArbitraryArgs
	cmd.Flags().StringVar(&table, "table", "", "the `NAME` of the table, where there are several")
	cmd.Flags().BoolVar(&all, "all", false, "all tables of culvert")
	return cmd
}

// tablesToClear are the listen ports of the tables that are meant.
func tablesToClear(table string, all bool) ([]uint16, error) {
	if table != "" && all {
		return nil, usageError{errors.New("want one of --table and --all"), "see `culvert capture clear --help`"}
	}
	ports, err := ruleset.Tables()
	if err != nil {
		return nil, err
	}
	if table != "" {
		port, ok := ruleset.Listen(table)
		if !ok || !slices.Contains(ports, port) {
			return nil, usageError{fmt.Errorf("there is no table %q of culvert", table), "`culvert capture show` lists them"}
		}
		return []uint16{port}, nil
	}
	if len(ports) > 1 && !all {
		var names []string
		for _, p := range ports {
			names = append(names, ruleset.Name(p))
		}
		return nil, usageError{fmt.Errorf("there are several tables: %s", strings.Join(names, ", ")), "say which with --table, or --all"}
	}
	return ports, nil
}

func clearTables(w io.Writer, ports []uint16) error {
	if len(ports) == 0 {
		_, err := fmt.Fprintln(w, "no rules of culvert in this network namespace")
		return err
	}
	var faults []error
	for _, port := range ports {
		if err := clearTable(port); err != nil {
			faults = append(faults, err)
			continue
		}
		_, _ = fmt.Fprintf(w, "table %s is gone: what it captured or refused leaves as it did before\n", ruleset.Name(port))
	}
	return errors.Join(faults...)
}

func clearTable(port uint16) error {
	lock, err := ruleset.Hold(port)
	if err != nil {
		return err
	}
	defer lock.Release()
	t, err := ruleset.Find(port)
	if errors.Is(err, ruleset.ErrNoTable) {
		return nil // gone meanwhile
	}
	if err != nil {
		return err
	}
	return t.Delete()
}

// clearAddresses stops the refusal of single addresses.
func clearAddresses(w io.Writer, ports []uint16, args []string) error {
	addresses := make(map[netip.Addr]bool)
	for _, arg := range args {
		a, err := netip.ParseAddr(arg)
		if err != nil {
			return usageError{fmt.Errorf("%q is no IP address", arg), "see `culvert capture clear --help`"}
		}
		addresses[a] = true
	}
	for _, port := range ports {
		t, err := ruleset.Find(port)
		if err != nil {
			return err
		}
		state, err := t.Read()
		if err != nil {
			return fmt.Errorf("read table %s: %w", t.Name(), err)
		}
		next := ruleset.State{Peers: state.Peers, Lost: maps.Clone(state.Lost)}
		maps.DeleteFunc(next.Lost, func(a netip.Addr, _ string) bool { return addresses[a] })
		if len(next.Lost) == len(state.Lost) {
			continue
		}
		if err := t.Change(state, next); err != nil {
			return err
		}
		for a := range state.Lost {
			if addresses[a] {
				delete(addresses, a)
				_, _ = fmt.Fprintf(w, "%s is not refused any more\n", a)
			}
		}
	}
	if len(addresses) == 0 {
		return nil
	}
	var left []string
	for _, a := range slices.SortedFunc(maps.Keys(addresses), netip.Addr.Compare) {
		left = append(left, a.String())
	}
	return notLostError{fmt.Errorf("not refused for a peer that has left: %s", strings.Join(left, ", "))}
}

// A notLostError is about addresses that are none to clear.
type notLostError struct{ error }

func (notLostError) Hint() string {
	return "`culvert capture show` lists what is refused; the addresses of peers in the configuration are captured as long as they are in it"
}
