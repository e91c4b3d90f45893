package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"culvert/locator"
	"culvert/sidecar"
)

func explainCommand() *cobra.Command {
	var s shown
	var probe bool
	cmd := s.register(&cobra.Command{
		Use:   "explain DATACENTER/NODE",
		Short: "Show how a peer is reached, step by step",
		Long: `Show how what the local server sends to a peer gets there: how it is captured,
which gateways would be tried in which order and why, and what the far side has to
show. With --probe a connection is made, and each of its steps is timed.`,
		Example: `  culvert explain dc2/bob
  culvert explain dc2/bob --probe`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dc, node, ok := strings.Cut(args[0], "/")
			if !ok || dc == "" || node == "" {
				return usageError{fmt.Errorf("%q is not DATACENTER/NODE", args[0]), "such as dc2/bob"}
			}
			path := "/v1/explain/" + url.PathEscape(dc) + "/" + url.PathEscape(node)
			if probe {
				path += "?probe"
			}
			return s.run(cmd, path, printExplanation)
		},
	})
	cmd.Flags().BoolVar(&probe, "probe", false, "make a connection and time its steps")
	return cmd
}

func printExplanation(w io.Writer, body []byte) error {
	var e sidecar.Explanation
	if err := json.Unmarshal(body, &e); err != nil {
		return err
	}
	state := "known from the " + e.Source
	if e.Critical {
		state += ", critical: it has stopped renewing its entry"
	}
	row(w, "peer", fmt.Sprintf("%s, advertised as %s, %s", e.Peer, e.Advertise, state))
	row(w, "capture", e.Capture)
	for _, sv := range e.Services {
		row(w, "service", fmt.Sprintf("%s, %s on port %d, by ALPN %s", sv.Name, sv.Kind, sv.Port, strings.Join(sv.ALPN, ", ")))
	}
	if e.Path != nil {
		row(w, "path", fmt.Sprintf("mode %s", e.Path.Mode))
		for i, c := range e.Path.Candidates {
			row(w, fmt.Sprintf("  %d.", i+1), candidate(c))
		}
	}
	row(w, "server name", e.ServerName)
	row(w, "certificate", e.Certificate)
	for _, p := range e.Probe {
		outcome := "ok"
		if !p.OK {
			outcome = "FAILED"
		}
		row(w, "probe", fmt.Sprintf("%s: %s after %v: %s", p.Step, outcome, time.Duration(p.TookUS)*time.Microsecond, p.Detail))
	}
	return nil
}

func candidate(c locator.Candidate) string {
	var from []string
	if c.Configured {
		from = append(from, "configured")
	}
	if c.Replicated {
		from = append(from, "replicated")
	}
	out := fmt.Sprintf("%s (%s): %s", c.Address, strings.Join(from, " and "), c.Reason)
	if c.LastError != "" {
		out += "; last error: " + c.LastError
	}
	return out
}
