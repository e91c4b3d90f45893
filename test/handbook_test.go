package test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"culvert/test/lab"
)

// What docs/serf.md shows works as it stands there.
func TestHandbookSerf(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	for name, files := range map[string]struct{ agent, sidecar, join string }{
		"redirect": {"serf/agent.json", "serf/sidecar.hcl", "10.72.0.11"},
		"bind":     {"serf/agent-bind.json", "serf/sidecar-bind.hcl", "127.77.2.1"},
	} {
		t.Run(name, func(t *testing.T) {
			e := lab.NewExamples(t, "consul")
			alice, bob := e.Hosts()
			gw1, gw2 := e.Gateways()
			e.Culvert(gw1, "gateway", "gateways/culvert.hcl")
			e.Culvert(gw2, "gateway", "gateways/culvert.hcl")
			for _, h := range []*lab.Host{alice, bob} {
				h.Start("serf", lab.Serf(t), "agent", "-config-file="+h.WriteFile("agent.json", e.File(h, files.agent)))
				e.Culvert(h, "sidecar", files.sidecar)
			}
			lab.Eventually(t, 20*time.Second, func() error {
				_, err := alice.Run(lab.Serf(t), "join", files.join)
				return err
			})
			lab.Eventually(t, 20*time.Second, func() error {
				for _, h := range []*lab.Host{alice, bob} {
					out, err := h.Run(lab.Serf(t), "members")
					if err != nil {
						return err
					}
					if strings.Count(out, "  alive") != 2 {
						return errors.New(h.Name + " sees:\n" + out)
					}
				}
				return nil
			})
			if n := e.SentPlainly(); n > 0 {
				t.Errorf("%d packets went past the sidecars", n)
			}
		})
	}
}
