package main

import (
	"context"
	"fmt"
	"os"
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

// docs/metrics.md lists every metric of a sidecar and of a gateway, and no
// other, in the words of their help.
func TestMetricsPage(t *testing.T) {
	cfg, err := config.LoadSidecar(files(t, "alice", nil), configOptions(config.Overrides{}))
	if err != nil {
		t.Fatal(err)
	}
	side := newRegistry()
	s, err := sidecar.New(cfg, sidecar.Options{Registry: side})
	if err != nil {
		t.Fatal(err)
	}
	gate := newRegistry()
	g, err := gateway.New(&config.Gateway{
		Datacenter: "dc1", Node: "gw", Domain: "consul",
		Listen: config.Listen{Address: "127.0.0.1:0"}, Admin: config.Admin{Address: "127.0.0.1:0"},
	}, gateway.Options{Registry: gate})
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
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := strings.Split(string(page), "\n## ")
	for kind, want := range map[string][]string{"Sidecar": rows(side), "Gateway": rows(gate)} {
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
		if !slices.Equal(got, want) {
			t.Errorf("docs/metrics.md, %s, should have\n%s", kind, strings.Join(want, "\n"))
		}
	}
}
