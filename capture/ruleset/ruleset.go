// Package ruleset is what redirect capture keeps in the kernel: one nftables
// table, which turns what the local server sends to its peers to the sidecar's
// endpoints, makes what the sidecar hands the server come from the peers, and
// refuses what must not leave plainly.
//
//	t := ruleset.New(ruleset.Spec{Listen: 8443, Ports: ports})
//	state, err := t.Read() // what a sidecar before this one left
//	...
//	err = t.Replace(state) // one transaction: there is no moment without rules
//	err = t.Change(state, next)
//
// Nothing of it is stateful: every packet is rewritten for itself, before
// connection tracking, which does not see it. Peers are elements of maps, so that
// the number of rules does not depend on theirs, and one that comes or goes
// touches no other.
//
//	map peers   advertised address -> endpoint's address
//	map back    endpoint's address -> advertised address
//	set lost    addresses that are refused: of peers that were, and are not any more
//
// The table belongs to whoever holds its [Lock]. It outlives the process: what is
// not carried is refused until someone who means it takes the table away. No
// other table is ever touched.
//
// A [Table] holds nothing but its description; its methods may be called from any
// goroutine, those that write by one at a time. All but the names need
// CAP_NET_ADMIN, and act in the network namespace of the calling thread.
package ruleset

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Mark is the socket mark (SO_MARK) of the sidecar's own sockets. Their connections
// pass as they are, though they may lead to a peer's host; their packets are those
// of peers for the server, and get the port of the service.
const Mark = 0x2c17

// The addresses of endpoints come from these. IPv4's are local on every host.
// IPv6 has one loopback address only: its range is a unique local one (RFC 4193)
// that [Table.Replace] makes local.
var (
	Range4 = netip.MustParsePrefix("127.200.0.0/16")           //nolint:gochecknoglobals // a constant
	Range6 = netip.MustParsePrefix("fd63:756c:7665:7274::/64") //nolint:gochecknoglobals // a constant
)

const tablePrefix = "culvert_"

// A Port is one service of the server.
type Port struct {
	Packet   bool   // UDP, not TCP
	Service  uint16 // on the peers' advertised addresses
	Endpoint uint16 // where the sidecar takes it
	Voice    uint16 // of a packet service: where the sidecar hands the server its packets from
}

// A Spec describes a table.
type Spec struct {
	Listen uint16 // the sidecar's listen port, which names the table
	Ports  []Port // at least one
	V6     bool   // whether the server's and the peers' addresses are IPv6
}

// Range is where the addresses of endpoints come from.
func (s Spec) Range() netip.Prefix {
	if s.V6 {
		return Range6
	}
	return Range4
}

// A Peer is one captured peer.
type Peer struct {
	Endpoint netip.Addr // within the range of the Spec
	Name     string     // for whoever reads the table: datacenter/node
}

// MaxName is how long a name may be, in bytes: that of a comment in nftables.
const MaxName = 127

// Label is a name as far as the kernel keeps it.
func Label(name string) string { return name[:min(len(name), MaxName)] }

// A State is the elements of a table. Names are [Label]s.
type State struct {
	Peers map[netip.Addr]Peer   // by advertised address
	Lost  map[netip.Addr]string // names, by address
}

// A Table is one sidecar's table in the kernel, whether it is there or not.
type Table struct{ spec Spec }

// New returns a table. Nothing is asked of the kernel.
func New(s Spec) *Table { return &Table{s} }

// Name is the table's name.
func (t *Table) Name() string { return Name(t.spec.Listen) }

// Name is the name of the table of the sidecar that listens on a port.
func Name(listen uint16) string { return fmt.Sprintf("%s%d", tablePrefix, listen) }

// Listen is the listen port in a table's name.
func Listen(name string) (uint16, bool) {
	digits, ok := strings.CutPrefix(name, tablePrefix)
	if !ok {
		return 0, false
	}
	port, err := strconv.ParseUint(digits, 10, 16)
	return uint16(port), err == nil && Name(uint16(port)) == name
}
