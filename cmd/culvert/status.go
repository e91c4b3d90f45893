package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"culvert/admin"
	"culvert/gateway"
	"culvert/sidecar"
)

const (
	statusTimeout = 20 * time.Second // a probe of a peer that does not answer takes 15
	maxStatus     = 64 << 20         // bytes; 5,000 peers are about 3 MB
)

func statusCommand() *cobra.Command {
	var addr string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what a running sidecar or gateway is doing",
		Long: `Show what a running sidecar or gateway is doing: its peers, the path to each,
the gateways, what was carried and dropped, and the last errors.`,
		Example: `  culvert status
  culvert status --admin 127.0.0.1:7441 --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			body, err := fetch(cmd.Context(), addr, "/v1/status")
			if err != nil {
				return err
			}
			if asJSON {
				_, err := cmd.OutOrStdout().Write(body)
				return err
			}
			return printStatus(cmd.OutOrStdout(), body)
		},
	}
	cmd.Flags().StringVar(&addr, "admin", admin.DefaultAddress, "admin `ADDR` of the process")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the JSON as it was served")
	return cmd
}

type unreachableError struct{ err error }

func (e unreachableError) Error() string { return e.err.Error() }
func (e unreachableError) Unwrap() error { return e.err }
func (e unreachableError) Hint() string {
	return "is the process running, and is --admin the address of its admin block?"
}

// fetch returns what a running process answers on a path of its admin address.
func fetch(ctx context.Context, addr, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--admin %q: %w", addr, err), "give it as host:port"}
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, unreachableError{fmt.Errorf("ask %s: %w", addr, errors.Unwrap(err))}
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxStatus))
	if err != nil {
		return nil, unreachableError{fmt.Errorf("read the answer: %w", err)}
	}
	if resp.StatusCode == http.StatusOK {
		return body, nil
	}
	var said struct{ Error string }
	if json.Unmarshal(body, &said) == nil && said.Error != "" {
		return nil, errors.New(said.Error)
	}
	return nil, unreachableError{fmt.Errorf("ask %s for %s: it answered %s", addr, path, resp.Status)}
}

func printStatus(w io.Writer, body []byte) error {
	var kind struct{ Kind string }
	if err := json.Unmarshal(body, &kind); err != nil {
		return unreachableError{fmt.Errorf("read the status: %w", err)}
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	switch kind.Kind {
	case "sidecar":
		var s sidecar.Status
		if err := json.Unmarshal(body, &s); err != nil {
			return fmt.Errorf("read the status of a sidecar: %w", err)
		}
		printSidecar(tw, s)
	case "gateway":
		var g gateway.Status
		if err := json.Unmarshal(body, &g); err != nil {
			return fmt.Errorf("read the status of a gateway: %w", err)
		}
		printGateway(tw, g)
	default:
		return unreachableError{errors.New("read the status: neither a sidecar nor a gateway answered")}
	}
	return tw.Flush()
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			_, _ = fmt.Fprint(w, "\t")
		}
		_, _ = fmt.Fprint(w, c) // tabwriter keeps the error for Flush
	}
	_, _ = fmt.Fprintln(w)
}

func readiness(ready bool) string {
	if ready {
		return "ready"
	}
	return "not ready"
}

func health(ok bool) string {
	if ok {
		return "healthy"
	}
	return "unhealthy"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
