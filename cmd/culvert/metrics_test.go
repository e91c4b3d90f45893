package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"culvert/config"
	"culvert/gateway"
	"culvert/sidecar"
)

var descriptor = regexp.MustCompile(`^Desc\{fqName: "(culvert_[a-z_]+)", help: "(.*?)"(?:, unit: "[^"]*")?, constLabels: \{[^}]*\}, variableLabels: \{([^}]*)\}`)

// rows are a registry's metrics as docs/metrics.md has them.
func rows(reg *prometheus.Registry) []string {
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		reg.Describe(ch)
	}()
	var out []string
	for d := range ch {
		m := descriptor.FindStringSubmatch(d.String())
		if m == nil {
			continue // Go's and the process's own
		}
		out = append(out, fmt.Sprintf("| `%s` | %s | %s |", m[1], strings.ReplaceAll(m[3], ",", ", "), m[2]))
	}
	slices.Sort(out)
	return out
}

// registered returns the registries of a sidecar and of a gateway that were made of
// two files.
func registered(t *testing.T, sidecarFile, gatewayFile string) (side, gate *prometheus.Registry) {
	t.Helper()
	cfg, err := config.LoadSidecar(sidecarFile, configOptions(config.Overrides{}))
	if err != nil {
		t.Fatal(err)
	}
	side, gate = newRegistry(), newRegistry()
	s, err := sidecar.New(cfg, sidecar.Options{Registry: side})
	if err != nil {
		t.Fatal(err)
	}
	gcfg, err := config.LoadGateway(gatewayFile, configOptions(config.Overrides{}))
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gcfg, gateway.Options{Registry: gate})
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for _, run := range []func(context.Context) error{s.Run, g.Run} { // gives the addresses up
		if err := run(over); err != nil {
			t.Error(err)
		}
	}
	return side, gate
}

// without returns the rows of some that others do not have.
func without(all, others []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(row string) bool { return slices.Contains(others, row) })
}

// docs/metrics.md lists every metric of a sidecar and of a gateway, what a
// federation block adds to each, and no other, in the words of their help.
func TestMetricsPage(t *testing.T) {
	alone := filepath.Join(t.TempDir(), "gateway.hcl")
	text := "datacenter = \"dc1\"\nnode = \"gw\"\nlisten { address = \"127.0.0.1:0\" }\nadmin { address = \"127.0.0.1:0\" }\n" +
		"sidecar \"alice\" { address = \"127.0.0.1:8443\" }\n"
	if err := os.WriteFile(alone, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	side, gate := registered(t, files(t, "alice", nil), alone)
	sidecarFile, gatewayFile := federated(t, "dc1")
	primarySide, primaryGate := registered(t, sidecarFile, gatewayFile)
	sidecarFile, gatewayFile = federated(t, "dc0")
	secondarySide, secondaryGate := registered(t, sidecarFile, gatewayFile)
	if more := without(rows(secondaryGate), rows(primaryGate)); len(more) > 0 {
		t.Errorf("a gateway of a secondary has more than one of the primary: %v", more)
	}
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := strings.Split(string(page), "\n## ")
	for kind, want := range map[string][]string{
		"Sidecar\n":                           rows(side),
		"Gateway\n":                           rows(gate),
		"A sidecar with a federation block\n": without(rows(secondarySide), rows(side)),
		"A sidecar of the primary, besides\n": without(rows(primarySide), rows(secondarySide)),
		"A gateway with a federation block\n": without(rows(primaryGate), rows(gate)),
	} {
		i := slices.IndexFunc(sections, func(s string) bool { return strings.HasPrefix(s, kind) })
		if i < 0 {
			t.Fatalf("docs/metrics.md has no section %q", kind)
		}
		var got []string
		for line := range strings.Lines(sections[i]) {
			if strings.HasPrefix(line, "| `culvert_") {
				got = append(got, strings.TrimSpace(line))
			}
		}
		if !slices.Equal(got, want) || len(want) == 0 {
			t.Errorf("docs/metrics.md, %s, should have\n%s", kind, strings.Join(want, "\n"))
		}
	}
}
