package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"culvert/alpn"
	"culvert/certs"
	"culvert/internal/h2"
	"culvert/test/lab"
)

// A stranger asks the primary's sidecars, as the holder of whatever certificate.
type stranger struct {
	s      *states
	source *certs.Source // nil: without a certificate
	client *http.Client
}

// stranger returns one that dials the primary's first gateway from the WAN side.
func (s *states) stranger(source *certs.Source) *stranger {
	x := &stranger{s: s, source: source}
	transport := h2.NewTransport(func(ctx context.Context, _ string) (*tls.Conn, error) {
		return x.dial(ctx, "server.dc1.consul", alpn.HTTP)
	}, h2.TransportOptions{})
	x.client = &http.Client{Transport: transport, Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
	s.t.Cleanup(transport.CloseIdleConnections)
	return x
}

func (x *stranger) dial(ctx context.Context, name, protocol string) (*tls.Conn, error) {
	raw, err := x.s.All[1].Gateways[0].Dial("tcp", lab.HostPort(x.s.All[0].Gateways[0].WAN, 8443))
	if err != nil {
		return nil, err
	}
	config := &tls.Config{ServerName: name, NextProtos: []string{protocol}, InsecureSkipVerify: true}
	if x.source != nil {
		config = x.source.ClientConfig(name, []string{protocol})
	}
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

// put registers something, and returns the status and the body of the answer.
func (x *stranger) put(path string, entry any) (int, string, error) {
	body, err := json.Marshal(entry)
	if err != nil {
		return 0, "", err
	}
	req, err := http.NewRequest(http.MethodPut, "https://server.dc1.consul"+path, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	resp, err := x.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// claim is what a server says of itself.
func claim(advertise string, port int) map[string]any {
	return map[string]any{
		"advertise": advertise, "address": "10.72.0.99:8443", "version": "0.1.0", "start": "stranger",
		"services": []map[string]any{
			{"name": "gossip-packet", "kind": "packet", "port": port}, {"name": "gossip-stream", "kind": "stream", "port": port},
		},
	}
}

// Nobody writes another's entry, and raft is for the primary's own.
func TestFederationEntriesAreTheirOwners(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 1}, lab.Size{Hosts: 1, Gateways: 1})
	s.begin()
	s.allKnown(30 * time.Second)
	s.allRegistered(10 * time.Second)
	store := s.members[0].sidecar
	_, before, err := store.Get("/v1/federation-states")
	if err != nil {
		t.Fatal(err)
	}
	counts := func(metric, reason string) float64 {
		return store.Metrics().Sum(metric, "reason", reason)
	}

	bob := s.pki.Source("server", "dc2", "bob", "consul")
	gw := s.pki.Source("gateway", "dc2", "gw9", "consul")
	refused := counts("culvert_federation_refused_total", "not_owner")
	for what, try := range map[string]struct {
		source *certs.Source
		path   string
		entry  any
	}{
		"a server of dc2 for dc1":          {bob, "/v1/federation-state/dc1/servers/dc1-s1", claim("127.77.9.1", 7946)},
		"a server for its sibling":         {bob, "/v1/federation-state/dc2/servers/dc2-s1", claim("127.77.9.1", 7946)},
		"a gateway for a server":           {gw, "/v1/federation-state/dc2/servers/dc2-s1", claim("127.77.9.1", 7946)},
		"a gateway for a server, its name": {gw, "/v1/federation-state/dc2/servers/gw9", claim("127.77.9.1", 7946)},
	} {
		code, body, err := s.stranger(try.source).put(try.path, try.entry)
		if err != nil || code != http.StatusForbidden || !strings.Contains(body, "its own to write") {
			t.Errorf("%s: %d %q, %v", what, code, body, err)
		}
	}
	if got := counts("culvert_federation_refused_total", "not_owner") - refused; got != 4 {
		t.Errorf("%v refusals were counted, want 4", got)
	}

	// raft from another datacenter, and anything without a certificate.
	for what, try := range map[string]struct {
		source           *certs.Source
		protocol, reason string
	}{
		"raft of dc2":         {bob, alpn.Raft, "cert_datacenter"},
		"no certificate":      {nil, alpn.HTTP, "cert_no_certificate"},
		"raft of a gateway":   {gw, alpn.Raft, "cert_role"},
		"packets of gateways": {gw, "culvert/packet/1/gossip-packet", "cert_role"},
	} {
		was := counts("culvert_mux_refused_total", try.reason)
		c, err := s.stranger(try.source).dial(t.Context(), "server.dc1.consul", try.protocol)
		if err == nil { // in TLS 1.3 a refusal comes out of the first read
			_, err = c.Read(make([]byte, 1))
			_ = c.Close()
		}
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: not refused: %v", what, err)
		}
		lab.Eventually(t, 5*time.Second, func() error {
			if now := counts("culvert_mux_refused_total", try.reason); now <= was {
				return fmt.Errorf("%s: refusals for %s stay at %v", what, try.reason, now)
			}
			return nil
		})
	}

	_, after, err := store.Get("/v1/federation-states")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the records have changed, %v:\n%s\n%s", err, before, after)
	}
}

// What an entry claims is bounded for those who read it.
func TestFederationClaimsAreBounded(t *testing.T) {
	lab.Require(t)
	t.Parallel()
	s := newStates(t, lab.Size{Hosts: 1, Gateways: 1}, lab.Size{Hosts: 1, Gateways: 1})
	reader := s.members[0]
	reader.config = strings.Replace(reader.config, "data_dir = \"state\"\n",
		"data_dir = \"state\"\nreap = \"48h\"\naccept \"dc1\" { advertise = [\"127.77.1.0/24\"] }\naccept \"dc2\" {\n  advertise = [\"127.77.2.0/24\", \"127.0.0.0/28\", \"10.0.0.0/8\"]\n  gateways = [\"10.0.0.0/8\"]\n}\n", 1)
	far := s.doors[1]
	far.config = strings.Replace(far.config, "data_dir    = \"state\"\n",
		"data_dir    = \"state\"\naccept \"dc1\" {\n  advertise = [\"127.77.1.0/24\"]\n  gateways = [\"10.79.0.0/16\"]\n}\n", 1)
	s.begin()
	s.allKnown(30 * time.Second)
	claims := map[string]struct {
		entry any
		kind  string
		why   string
	}{
		"loopback": {claim("127.0.0.1", 7946), "servers", "127.0.0.1 is a loopback address"},
		"owner":    {claim(reader.host.Addr.String(), 7946), "servers", "is this sidecar's own"},
		"port":     {claim("127.77.2.50", 22), "servers", "packet on port 22, and here it is packet on port 7946"},
		"range":    {claim("127.77.1.77", 7946), "servers", "in the range of dc1, by accept"},
		"inside":   {map[string]any{"address": "10.72.0.98:8443", "wan_address": "10.71.0.200:8443", "start": "x"}, "gateways", ""},
		"lo":       {map[string]any{"address": "10.72.0.97:8443", "wan_address": "127.0.0.1:8443", "start": "x"}, "gateways", "outside what accept \"dc2\" allows"},
	}
	for node, c := range claims {
		role := strings.TrimSuffix(c.kind, "s")
		code, body, err := s.stranger(s.pki.Source(role, "dc2", node, "consul")).put("/v1/federation-state/dc2/"+c.kind+"/"+node, c.entry)
		if err != nil || code != http.StatusOK {
			t.Fatalf("%s: %d %q, %v", node, code, body, err)
		}
	}
	// The gateway of dc1 has no accept block: the network is its own.
	insides := func(d *lab.Daemon) string {
		_, body, _ := d.Get("/v1/status")
		return string(body)
	}
	for node, c := range claims {
		if c.why == "" {
			continue
		}
		lab.Eventually(t, 5*time.Second, func() error {
			st, err := reader.status()
			if err != nil {
				return err
			}
			for _, r := range st.Federation.KeptOut {
				if r.Key.Name == node && strings.Contains(r.Why, c.why) {
					return nil
				}
			}
			return fmt.Errorf("%s is not kept out for %q: %v", node, c.why, st.Federation.KeptOut)
		})
	}
	lab.Eventually(t, 5*time.Second, func() error {
		if text := insides(s.doors[0].daemon); !strings.Contains(text, "is inside this datacenter's own network") {
			return fmt.Errorf("the gateway does not keep out a gateway in its own network: %s", text)
		}
		return nil
	})
	st, err := reader.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range st.Peers {
		if p.Node != "dc2-s1" {
			t.Errorf("%s is captured, at %s", p.Node, p.Advertise)
		}
	}
	for _, g := range st.Gateways {
		if strings.HasPrefix(g.Address, "127.") {
			t.Errorf("gateway %s may be dialled", g.Address)
		}
	}
	log := reader.sidecar.Output()
	for node, c := range claims {
		if c.why != "" && strings.Count(log, fmt.Sprintf("entry kept out\",\"entry\":\"%sdc2/%s\"", map[bool]string{true: "gateway "}[c.kind == "gateways"], node)) != 1 {
			t.Errorf("%s is not told by one line", node)
		}
	}
	// Nothing listens for them.
	for _, at := range []string{"127.77.2.50:22", "127.77.1.77:7946"} {
		if c, err := reader.host.Dial("tcp", netip.MustParseAddrPort(at).String()); err == nil {
			_ = c.Close()
			t.Errorf("%s is answered", at)
		}
	}
}
