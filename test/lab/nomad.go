package lab

import (
	_ "embed" // the configuration
	"fmt"
	"net/netip"
	"strings"
)

//go:embed nomad.hcl.tmpl
var nomadTemplate string

// NomadOptions are what a Nomad agent is told.
type NomadOptions struct {
	Region, Node string
	Servers      []netip.Addr // of a client's region; none: the agent is a server

	Expect         int          // how many servers the region has
	Join           []netip.Addr // servers of all regions
	Encrypt        string       // the key of their gossip
	RaftMultiplier int          // 0: the server's default

	// Bind and AdvertiseSerf are for a server behind a sidecar that captures by
	// bind; the zero Addr leaves both out.
	Bind, AdvertiseSerf netip.Addr
}

// A Nomad is an unmodified Nomad agent on a host.
type Nomad struct {
	*Process
	*HTTPAPI
	NomadOptions
	Config string // its configuration
}

// StartNomad starts an agent with the configuration and the command line that it
// would have without Culvert.
func (h *Host) StartNomad(o NomadOptions) *Nomad {
	h.t.Helper()
	address := "127.0.0.1:4646"
	if o.Bind.IsValid() {
		address = HostPort(o.Bind, 4646)
	}
	n := &Nomad{HTTPAPI: h.API(address), NomadOptions: o}
	n.Config = render(h.t, nomadTemplate, struct {
		NomadOptions
		Dir string
	}{o, h.Dir})
	file := h.WriteFile("nomad.hcl", n.Config)
	n.Process = h.Start("nomad", NomadProgram(h.t), "agent", "-config="+file)
	return n
}

// Do runs a command of nomad's against the agent: its words first, flags after
// them.
func (n *Nomad) Do(command string, args ...string) (string, error) {
	all := append(strings.Fields(command), "-address=http://"+n.address)
	return n.Process.host.Run(NomadProgram(n.Process.host.t), append(all, args...)...)
}

// A NomadMember is what a server knows of another one.
type NomadMember struct{ Address, Status string }

// Members are the servers of all regions that the server knows, by name.
func (n *Nomad) Members() (map[string]NomadMember, error) {
	var answer struct {
		Members []struct {
			Name, Addr, Status string
			Port               uint16
		}
	}
	if _, err := n.Call("GET", "/v1/agent/members", nil, &answer); err != nil {
		return nil, err
	}
	members := make(map[string]NomadMember)
	for _, m := range answer.Members {
		members[m.Name] = NomadMember{fmt.Sprintf("%s:%d", m.Addr, m.Port), m.Status}
	}
	return members, nil
}

// Leader is the RPC address of a region's leader.
func (n *Nomad) Leader(region string) (netip.AddrPort, error) {
	var leader string
	if _, err := n.Call("GET", "/v1/status/leader?region="+region, nil, &leader); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.ParseAddrPort(leader)
}

// Term is the term of the region's raft group that the server is in.
func (n *Nomad) Term() (string, error) {
	var self struct{ Stats map[string]map[string]string }
	if _, err := n.Call("GET", "/v1/agent/self", nil, &self); err != nil {
		return "", err
	}
	term := self.Stats["raft"]["term"]
	if term == "" {
		return "", fmt.Errorf("%s tells no term: %v", n.Node, self.Stats["raft"])
	}
	return term, nil
}
