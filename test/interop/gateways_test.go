package interop

import (
	"os/exec"
	"strings"
	"testing"

	"culvert/test/lab"
)

// HAProxy and nginx take the place of culvert's gateways, as docs/gateways.md
// shows them.
func TestConsulBindHAProxy(t *testing.T) { require(t); testConsul(t, way{gateway: haproxy}) }

func TestConsulRedirectHAProxy(t *testing.T) {
	require(t)
	testConsul(t, way{redirect: true, gateway: haproxy})
}
func TestConsulBindNginx(t *testing.T) { require(t); testConsul(t, way{gateway: nginx}) }
func TestConsulRedirectNginx(t *testing.T) {
	require(t)
	testConsul(t, way{redirect: true, gateway: nginx})
}

func haproxy(f *federation, at siteAt) {
	f.t.Helper()
	h := f.Sites[at].Gateway
	startHAProxy(f.t, h, f.routed(at, "haproxy.cfg"))
}

func nginx(f *federation, at siteAt) {
	f.t.Helper()
	h := f.Sites[at].Gateway
	startNginx(f.t, h, f.routed(at, "nginx.conf"))
}

func startHAProxy(t *testing.T, h *lab.Host, config string) {
	t.Helper()
	h.Start("haproxy", installed(t, "haproxy"), "-db", "-f", h.WriteFile("haproxy.cfg", config))
}

func startNginx(t *testing.T, h *lab.Host, config string) {
	t.Helper()
	h.Start("nginx", installed(t, "nginx"), "-c", h.WriteFile("nginx.conf", config), "-g", "daemon off;")
}

// installed is where a program is that `make interop` fetches.
func installed(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%v: install Debian's packages haproxy, nginx and libnginx-mod-stream", err)
	}
	return path
}

// routed is an example of deploy/gateways for a site, with its servers in the
// place of those two that the example has.
func (f *federation) routed(at siteAt, name string) string {
	f.t.Helper()
	site, other := f.Sites[at], f.Sites[1-at]
	var out strings.Builder
	unit := ""
	for line := range strings.Lines(lab.Deployed(f.t, "gateways/"+name)) {
		unit += line
		switch {
		case strings.HasPrefix(line, "backend alice"): // with its one server
			continue
		case strings.Contains(line, "amy"):
		case !strings.Contains(unit, "alice"), strings.HasPrefix(line, "#"):
			out.WriteString(unit)
		default: // what is alice's is each server's
			for _, s := range f.servers {
				if s.at != at {
					continue
				}
				out.WriteString(strings.NewReplacer("alice", s.Node, "10.71.0.11:8443", lab.HostPort(s.Host.Addr, s.Kind.Port)).Replace(unit))
			}
		}
		unit = ""
	}
	return strings.NewReplacer(
		"dc1", site.Name, "dc2", other.Name, "10.79.0.2", other.WAN.String(), "/run/", site.Gateway.Dir+"/",
	).Replace(out.String())
}
