package lab

import (
	_ "embed" // the configuration
	"fmt"
	"net/netip"
	"strings"
)

//go:embed consul.hcl.tmpl
var consulTemplate string

// ConsulOptions are what a Consul server is told.
type ConsulOptions struct {
	Datacenter, Node string
	Expect           int          // how many servers its datacenter has
	Join, JoinWAN    []netip.Addr // servers of its own datacenter, and of others
	Encrypt          string       // the key of its gossip

	// Bind and AdvertiseWAN are for a server behind a sidecar that captures by
	// bind; the zero Addr leaves both out.
	Bind, AdvertiseWAN netip.Addr

	TLS *Files // of its own; nil: none

	// Primary and PrimaryGateways are for a native server: one that federates
	// by mesh gateways, in a secondary datacenter.
	Primary         string
	PrimaryGateways []netip.AddrPort
}

// A Consul is an unmodified Consul server on a host.
type Consul struct {
	*Process
	*HTTPAPI
	ConsulOptions
	Config string // its configuration
}

// StartConsul starts a server with the configuration and the command line that
// it would have without Culvert.
func (h *Host) StartConsul(o ConsulOptions) *Consul {
	h.t.Helper()
	c := &Consul{HTTPAPI: h.API("127.0.0.1:8500"), ConsulOptions: o, Config: render(h.t, consulTemplate, o)}
	file := h.WriteFile("consul.hcl", c.Config)
	c.Process = h.Start("consul", ConsulProgram(h.t), "agent", "-config-file="+file)
	return c
}

// Do runs a command of consul's against the server.
func (c *Consul) Do(args ...string) (string, error) {
	return c.Process.host.Run(ConsulProgram(c.Process.host.t), args...)
}

// A WANMember is a line of consul members -wan.
type WANMember struct{ Address, Status string }

// WANMembers is what consul members -wan prints, by name.
func (c *Consul) WANMembers() (map[string]WANMember, error) {
	out, err := c.Do("members", "-wan")
	if err != nil {
		return nil, err
	}
	members := make(map[string]WANMember)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 3 {
			return nil, fmt.Errorf("members of %s: %q", c.Node, out)
		}
		members[f[0]] = WANMember{f[1], f[2]}
	}
	delete(members, "Node") // the heading
	return members, nil
}

// Leader is the RPC address of the leader that the server knows.
func (c *Consul) Leader() (netip.AddrPort, error) {
	var leader string
	if _, err := c.Call("GET", "/v1/status/leader", nil, &leader); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.ParseAddrPort(leader)
}
