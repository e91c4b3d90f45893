package interop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"culvert/test/lab"
)

// examples starts the two gateways of the handbook's network.
func examples(t *testing.T, domains ...string) (e *lab.Examples, hosts []*lab.Host) {
	t.Helper()
	e = lab.NewExamples(t, domains...)
	gw1, gw2 := e.Gateways()
	e.Culvert(gw1, "gateway", "gateways/culvert.hcl")
	e.Culvert(gw2, "gateway", "gateways/culvert.hcl")
	alice, bob := e.Hosts()
	return e, []*lab.Host{alice, bob}
}

func wantNothingPlain(t *testing.T, e *lab.Examples) {
	t.Helper()
	if n := e.SentPlainly(); n > 0 {
		t.Errorf("%d packets went past the sidecars", n)
	}
}

// What docs/consul.md shows works as it stands there.
func TestHandbookConsul(t *testing.T) {
	require(t)
	for name, files := range map[string]struct{ server, sidecar string }{
		"redirect": {"consul/server.hcl", "consul/sidecar.hcl"},
		"bind":     {"consul/server-bind.hcl", "consul/sidecar-bind.hcl"},
	} {
		t.Run(name, func(t *testing.T) {
			e, hosts := examples(t, "consul")
			program := lab.ConsulProgram(t)
			for _, h := range hosts {
				e.Culvert(h, "sidecar", files.sidecar) // first: before it nothing is captured
				h.Start("consul", program, "agent", "-config-file="+h.WriteFile("server.hcl", e.File(h, files.server)))
			}
			all(t, settle, hosts, func(h *lab.Host) error {
				out, err := h.Run(program, "members", "-wan")
				if err == nil && strings.Count(out, "  alive") != 2 {
					err = errors.New(h.Name + " sees:\n" + out)
				}
				return err
			})
			for i, h := range hosts {
				other := fmt.Sprintf("dc%d", 2-i)
				all(t, settle, hosts[:1], func(*lab.Host) error {
					_, err := h.Run(program, "kv", "put", "-datacenter="+other, "x", "y")
					return err
				})
			}
			wantNothingPlain(t, e)
		})
	}
}

// What docs/nomad.md shows works as it stands there.
func TestHandbookNomad(t *testing.T) {
	require(t)
	e, hosts := examples(t, "nomad")
	program := lab.NomadProgram(t)
	for _, h := range hosts {
		h.StartAnother("sidecar", "sidecar", e.File(h, "nomad/sidecar.hcl"), "127.0.0.1:7441")
		h.Start("nomad", program, "agent", "-config="+h.WriteFile("server.hcl", e.File(h, "nomad/server.hcl")))
	}
	all(t, settle, hosts, func(h *lab.Host) error {
		out, err := h.Run(program, "server", "members")
		if err == nil && strings.Count(out, "  alive") != 2 {
			err = errors.New(h.Name + " sees:\n" + out)
		}
		return err
	})
	for i, h := range hosts {
		region := fmt.Sprintf("dc%d", 2-i)
		all(t, settle, hosts[:1], func(*lab.Host) error {
			out, err := h.Run(program, "operator", "raft", "list-peers", "-region="+region)
			if err == nil && !strings.Contains(out, "leader") {
				err = fmt.Errorf("peers of %s seen from %s:\n%s", region, h.Name, out)
			}
			return err
		})
	}
	wantNothingPlain(t, e)
}

// What docs/memberlist.md shows works as it stands there.
func TestHandbookAlertmanager(t *testing.T) {
	require(t)
	e, hosts := examples(t, "consul")
	for _, h := range hosts {
		if err := os.MkdirAll(filepath.Join(h.Dir, "alertmanager"), 0o755); err != nil {
			t.Fatal(err)
		}
		h.WriteFile("alertmanager/alertmanager.yml", "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
		e.Culvert(h, "sidecar", "alertmanager/sidecar.hcl")
		h.Start("alertmanager", lab.AlertmanagerProgram(t), strings.Fields(e.File(h, "alertmanager/flags"))...)
	}
	all(t, settle, hosts, func(h *lab.Host) error {
		var status struct {
			Cluster struct {
				Status string
				Peers  []struct{ Address string }
			}
		}
		_, err := h.API("127.0.0.1:9093").Call("GET", "/api/v2/status", nil, &status)
		if err == nil && len(status.Cluster.Peers) != 2 {
			err = fmt.Errorf("%s sees %+v", h.Name, status.Cluster)
		}
		return err
	})
	// A silence of one is known to the other.
	silence := map[string]any{
		"matchers": []map[string]any{{"name": "alertname", "value": "x", "isRegex": false}},
		"startsAt": "2020-01-01T00:00:00Z", "endsAt": "2100-01-01T00:00:00Z", "createdBy": "alice", "comment": "across",
	}
	if _, err := hosts[0].API("127.0.0.1:9093").Call("POST", "/api/v2/silences", silence, nil); err != nil {
		t.Fatal(err)
	}
	all(t, settle, hosts, func(h *lab.Host) error {
		var silences []struct{ Comment string }
		_, err := h.API("127.0.0.1:9093").Call("GET", "/api/v2/silences", nil, &silences)
		if err == nil && (len(silences) != 1 || silences[0].Comment != "across") {
			err = fmt.Errorf("%s has %v", h.Name, silences)
		}
		return err
	})
	wantNothingPlain(t, e)
}
