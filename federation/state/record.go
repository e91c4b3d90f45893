// Package state is what a federation knows: one [Record] for each datacenter, with
// its gateways and servers. It is pure: [State] never changes, [State.Apply]
// makes the next one of a command, and the same commands make the same states
// everywhere.
//
//	s := state.New()
//	s, err := s.Apply(index, state.Command{Register: &state.Registration{...}, At: now})
//	changes := s.Since(then)
//
// A State may be read from any goroutine. Who may write what, and when, is not
// its business; that two entries do not claim the same is.
package state

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The limits of what is stored. A record has some 300 bytes a server.
const (
	MaxDatacenters = 4096
	MaxServers     = 256 // of one datacenter
	MaxGateways    = 64  // of one datacenter
	MaxServices    = 32  // of one server

	maxName    = 253 // a node's or gateway's, in bytes
	maxAddress = 300 // host:port
	maxWord    = 64  // a version, an instance
)

// Health is whether an entry's owner renews it.
type Health string

// The healths.
const (
	Passing  Health = "passing"
	Critical Health = "critical" // its lease ran out: peers keep its endpoints, and refuse
)

// A Kind is what an entry is of.
type Kind string

// The kinds, as they stand in the paths of the API.
const (
	KindServer  Kind = "servers"
	KindGateway Kind = "gateways"
)

// A Key names one entry.
type Key struct {
	Datacenter string `json:"datacenter"`
	Kind       Kind   `json:"kind"`
	Name       string `json:"name"`
}

// String returns "datacenter/name", with "gateway" before a gateway's.
func (k Key) String() string {
	if k.Kind == KindGateway {
		return "gateway " + k.Datacenter + "/" + k.Name
	}
	return k.Datacenter + "/" + k.Name
}

// A Process tells the processes that register one entry apart.
type Process struct {
	// Instance is kept in a data folder: a process with the same is the
	// same one, started again. It is "" where nothing is kept.
	Instance string `json:"instance,omitempty"`
	// Start is another one each time a process starts.
	Start string `json:"start"`
	// Replaced is the Start of who had the entry before.
	Replaced string `json:"replaced,omitempty"`
}

// A Service is one port of a server.
type Service struct {
	Name string `json:"name"`
	Kind string `json:"kind"` // packet or stream
	Port uint16 `json:"port"`
}

// A Server is one server, as its sidecar registered it.
type Server struct {
	Node      string     `json:"node"`
	Advertise netip.Addr `json:"advertise"`
	Address   string     `json:"address"` // host:port of its sidecar, for its own datacenter
	Version   string     `json:"version"` // of Culvert
	Services  []Service  `json:"services"`
	Health    Health     `json:"health"`
	Since     time.Time  `json:"since"` // when Health last changed
	Process
}

// A Gateway is one gateway, as it registered itself.
type Gateway struct {
	Name       string    `json:"name"`
	Address    string    `json:"address"`     // host:port, for its own datacenter
	WANAddress string    `json:"wan_address"` // host:port, for the others
	Version    string    `json:"version"`
	Health     Health    `json:"health"`
	Since      time.Time `json:"since"`
	Process
}

// A Record is all that is known of one datacenter. Its lists are in the order
// of names.
type Record struct {
	Datacenter string    `json:"datacenter"`
	Index      uint64    `json:"index"`      // of the change that made it what it is
	UpdatedAt  time.Time `json:"updated_at"` // when that was
	Gateways   []Gateway `json:"gateways"`
	Servers    []Server  `json:"servers"`
	// Removed is a record that is no more: only among changes.
	Removed bool `json:"removed,omitempty"`
}

// Server finds a server by its node.
func (r *Record) Server(node string) (Server, bool) {
	if i, ok := r.server(node); ok {
		return r.Servers[i], true
	}
	return Server{}, false
}

// Gateway finds a gateway by its name.
func (r *Record) Gateway(name string) (Gateway, bool) {
	if i, ok := r.gateway(name); ok {
		return r.Gateways[i], true
	}
	return Gateway{}, false
}

func (r *Record) server(node string) (int, bool) {
	return slices.BinarySearchFunc(r.Servers, node, func(s Server, n string) int { return cmp.Compare(s.Node, n) })
}

func (r *Record) gateway(name string) (int, bool) {
	return slices.BinarySearchFunc(r.Gateways, name, func(g Gateway, n string) int { return cmp.Compare(g.Name, n) })
}

// Check tells what is wrong with a record that somebody else made.
func (r *Record) Check() error {
	if err := checkLabels("datacenter", r.Datacenter, 63); err != nil {
		return err
	}
	if strings.Contains(r.Datacenter, ".") {
		return fmt.Errorf("datacenter %q is more than one label", r.Datacenter)
	}
	if len(r.Servers) > MaxServers || len(r.Gateways) > MaxGateways {
		return fmt.Errorf("%d servers and %d gateways are more than %d and %d", len(r.Servers), len(r.Gateways), MaxServers, MaxGateways)
	}
	for i := range r.Servers {
		if err := r.Servers[i].Check(); err != nil {
			return fmt.Errorf("server %q: %w", r.Servers[i].Node, err)
		}
	}
	for i := range r.Gateways {
		if err := r.Gateways[i].Check(); err != nil {
			return fmt.Errorf("gateway %q: %w", r.Gateways[i].Name, err)
		}
	}
	sorted := slices.IsSortedFunc(r.Servers, func(a, b Server) int { return strictly(a.Node, b.Node) }) &&
		slices.IsSortedFunc(r.Gateways, func(a, b Gateway) int { return strictly(a.Name, b.Name) })
	if !sorted {
		return errors.New("its servers or gateways are not in order, or one is there twice")
	}
	return nil
}

// strictly makes equal names be out of order: who asks passes the later one
// first.
func strictly(a, b string) int { return cmp.Or(cmp.Compare(a, b), -1) }

// Check tells what is wrong with a server's entry.
func (s *Server) Check() error {
	if err := errors.Join(checkLabels("node", s.Node, maxName), checkAddress("address", s.Address), s.check(s.Version, s.Health)); err != nil {
		return err
	}
	switch a := s.Advertise; {
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast(), a.Zone() != "", a.Is4In6():
		return fmt.Errorf("advertise %q is no address of a server", a)
	case len(s.Services) == 0:
		return errors.New("it has no service")
	case len(s.Services) > MaxServices:
		return fmt.Errorf("%d services are more than %d", len(s.Services), MaxServices)
	}
	seen := make(map[string]bool, len(s.Services))
	for _, one := range s.Services {
		if !validService(one.Name) || one.Kind != "packet" && one.Kind != "stream" || one.Port == 0 || seen[one.Name] {
			return fmt.Errorf("service %q of kind %q on port %d is not possible, or there twice", one.Name, one.Kind, one.Port)
		}
		seen[one.Name] = true
	}
	return nil
}

// Check tells what is wrong with a gateway's entry.
func (g *Gateway) Check() error {
	return errors.Join(checkLabels("name", g.Name, maxName), checkAddress("address", g.Address),
		checkAddress("wan_address", g.WANAddress), g.check(g.Version, g.Health))
}

func (p *Process) check(version string, h Health) error {
	switch {
	case p.Start == "":
		return errors.New("start is empty")
	case len(version) > maxWord, len(p.Instance) > maxWord, len(p.Start) > maxWord, len(p.Replaced) > maxWord:
		return fmt.Errorf("version, instance and start have %d bytes at most", maxWord)
	case !printable(version), !printable(p.Instance), !printable(p.Start), !printable(p.Replaced):
		return errors.New("version, instance and start are printable ASCII")
	case h != Passing && h != Critical:
		return fmt.Errorf("health %q is neither passing nor critical", h)
	}
	return nil
}

// checkLabels allows what DNS allows of host names, in lower case.
func checkLabels(what, name string, limit int) error {
	if name == "" || len(name) > limit {
		return fmt.Errorf("%s of %d bytes: want 1 to %d", what, len(name), limit)
	}
	for label := range strings.SplitSeq(name, ".") {
		if !validLabel(label) {
			return fmt.Errorf("%s %q is not made of DNS labels", what, name)
		}
	}
	return nil
}

func validLabel(label string) bool {
	return label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' && onlyLDH(label)
}

func validService(name string) bool { return name != "" && len(name) <= 63 && onlyLDH(name) }

// onlyLDH allows letters in lower case, digits and hyphens.
func onlyLDH(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// printable keeps out what JSON would not give back as it was.
func printable(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// checkAddress allows an IP address or a host name, with a port.
func checkAddress(what, address string) error {
	host, port, err := net.SplitHostPort(address)
	n, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || n == 0 || len(address) > maxAddress {
		return fmt.Errorf("%s %q is not host:port", what, address)
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" {
		return nil
	}
	return checkLabels(what, strings.ToLower(host), maxName)
}

// encode is the one form of a record in JSON. Its bytes are compared, so there
// are no nil lists.
func (r *Record) encode() json.RawMessage {
	c := *r
	if c.Gateways == nil {
		c.Gateways = []Gateway{}
	}
	if c.Servers == nil {
		c.Servers = []Server{}
	}
	b, err := json.Marshal(&c)
	if err != nil { // nothing in it can fail
		panic(fmt.Sprintf("encode record: %v", err))
	}
	return b
}
