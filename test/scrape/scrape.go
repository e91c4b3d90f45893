// Package scrape reads what a running culvert serves on its admin address, for
// the demo and the end-to-end tests.
//
//	m, err := scrape.Metrics(ctx, http.DefaultClient, "127.0.0.1:7440")
//	sent := m.Sum("culvert_packet_frames_total", "direction", "out")
package scrape

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// maxBody bounds an answer, in bytes.
const maxBody = 64 << 20

// Get returns the status code and the body of a path on an admin address.
func Get(ctx context.Context, client *http.Client, addr, path string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return 0, nil, fmt.Errorf("read %s: %w", path, err)
	}
	return resp.StatusCode, body, nil
}

// Status decodes /v1/status into v.
func Status(ctx context.Context, client *http.Client, addr string, v any) error {
	code, body, err := Get(ctx, client, addr, "/v1/status")
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("/v1/status of %s: %d %s", addr, code, body)
	}
	return json.Unmarshal(body, v)
}

// A Sample is one line of /metrics.
type Sample struct {
	Name   string
	Labels map[string]string
	Value  float64
}

// Samples are all the counters and gauges of one reading.
type Samples []Sample

// Metrics reads /metrics.
func Metrics(ctx context.Context, client *http.Client, addr string) (Samples, error) {
	code, body, err := Get(ctx, client, addr, "/metrics")
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("/metrics of %s: %d", addr, code)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		return nil, fmt.Errorf("parse /metrics of %s: %w", addr, err)
	}
	var out Samples
	for name, family := range families {
		for _, m := range family.GetMetric() {
			s := Sample{Name: name, Labels: make(map[string]string)}
			for _, l := range m.GetLabel() {
				s.Labels[l.GetName()] = l.GetValue()
			}
			s.Value = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			out = append(out, s)
		}
	}
	return out, nil
}

// Sum adds the samples of a name whose labels have the given values: label,
// value, label, value and so on.
func (all Samples) Sum(name string, labels ...string) float64 {
	var sum float64
	for _, s := range all {
		if s.Name != name {
			continue
		}
		match := true
		for i := 0; i+1 < len(labels); i += 2 {
			match = match && s.Labels[labels[i]] == labels[i+1]
		}
		if match {
			sum += s.Value
		}
	}
	return sum
}
