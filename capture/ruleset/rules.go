package ruleset

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// priority is that of both chains: before connection tracking (-200) and before
// the raw tables of others (-300).
const priority = -310

// The offsets of what is looked at and rewritten, in bytes.
const (
	sportOffset = 0 // of the transport header, UDP and TCP alike
	dportOffset = 2

	udpChecksum = 6
	tcpChecksum = 16
	// icmpChecksum is that of ICMP and ICMPv6.
	icmpChecksum = 2
	// icmpHeader is how long an error message is before the packet that it
	// quotes (RFC 792, RFC 4443 section 3.1).
	icmpHeader = 8
)

// A header is where a protocol keeps what rules need.
type header struct {
	size            uint32 // of an address
	src, dst        uint32 // offsets of the addresses in the network header
	next            uint32 // offset of the byte that tells the transport protocol
	length          uint32 // of the header without options
	checksum        func(offset uint32) uint32
	icmp            byte // the protocol of error messages
	family          nftables.TableFamily
	unreachable     byte // type of "destination unreachable"
	portUnreachable byte // its code
	exceeded        byte // type of "time exceeded"
	first           byte // of a header without options, 0 if it tells nothing
}

// headerOf returns the layout of IPv4 (RFC 791) or IPv6 (RFC 8200).
//
// An IPv6 header has no checksum, but the transport's covers the addresses, and
// the kernel is told to correct that only together with a checksum's place. The
// place given is the address's own, which is overwritten next.
func headerOf(v6 bool) header {
	if v6 {
		return header{
			size: 16, src: 8, dst: 24, next: 6, length: 40,
			checksum: func(offset uint32) uint32 { return offset },
			icmp:     unix.IPPROTO_ICMPV6, family: nftables.TableFamilyIPv6, unreachable: 1, portUnreachable: 4, exceeded: 3,
		}
	}
	return header{
		size: 4, src: 12, dst: 16, next: 9, length: 20,
		checksum: func(uint32) uint32 { return 10 },
		icmp:     unix.IPPROTO_ICMP, family: nftables.TableFamilyIPv4, unreachable: 3, portUnreachable: 3, exceeded: 11, first: 0x45,
	}
}

func transport(packet bool) (proto byte, checksum uint32) {
	if packet {
		return unix.IPPROTO_UDP, udpChecksum
	}
	return unix.IPPROTO_TCP, tcpChecksum
}

// The registers that rules use; each holds 16 bytes.
const (
	reg1 = unix.NFT_REG_1
	reg2 = unix.NFT_REG_2
)

// What follows are the parts of rules. A rule goes on while its parts agree.

type part []expr.Any

func rule(parts ...part) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func is(key expr.MetaKey, value ...byte) part {
	return part{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: value},
	}
}

// notLoopback matches what came in, or goes out, by another interface.
func notLoopback(key expr.MetaKey) part {
	const loopback = 1 // its index in each network namespace (LOOPBACK_IFINDEX in linux/netdevice.h)
	return part{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(loopback)},
	}
}

func load(base expr.PayloadBase, offset, n, reg uint32) part {
	return part{&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: n}}
}

func store(base expr.PayloadBase, offset, n, reg, checksum, flags uint32) part {
	return part{&expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: reg, Base: base, Offset: offset, Len: n,
		CsumType: expr.CsumTypeInet, CsumOffset: checksum, CsumFlags: flags,
	}}
}

func equals(base expr.PayloadBase, offset uint32, value ...byte) part {
	return append(load(base, offset, uint32(len(value)), reg1), //nolint:gosec // a few bytes
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: value})
}

const (
	network = expr.PayloadBaseNetworkHeader
	th      = expr.PayloadBaseTransportHeader
)

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// within matches an address in the range.
func within(offset uint32, r netip.Prefix) part {
	n := r.Bits() / 8
	return equals(network, offset, r.Addr().AsSlice()[:n]...)
}

// find looks an address up. In a map that gives the value, in reg; in a set it
// only has to be there.
func (h header) find(offset uint32, in *nftables.Set, reg uint32) part {
	return append(load(network, offset, h.size, reg1), lookup(in, reg))
}

func lookup(in *nftables.Set, reg uint32) expr.Any {
	return &expr.Lookup{SourceRegister: reg1, DestRegister: reg, IsDestRegSet: in.IsMap, SetName: in.Name, SetID: in.ID}
}

// setAddress writes an address of the network header, and corrects the checksums
// that cover it: the header's own and, by way of the pseudo-header, the
// transport's.
func (h header) setAddress(offset, reg uint32) part {
	return store(network, offset, h.size, reg, h.checksum(offset), unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR)
}

func setPort(offset uint32, to uint16, checksum uint32) part {
	return append(part{&expr.Immediate{Register: reg2, Data: port(to)}}, store(th, offset, 2, reg2, checksum, 0)...)
}

// marked matches what a socket of the sidecar's own sends.
func marked() part { return is(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(Mark)...) }

func proceed(chain string) part {
	return part{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}

func untracked() part { return part{&expr.Notrack{}} }
func accept() part    { return part{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() part      { return part{&expr.Verdict{Kind: expr.VerdictDrop}} }

func (h header) refuse(packet bool) part {
	if packet {
		return part{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: h.portUnreachable}}
	}
	return part{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
}

// A chain is one chain of the table. Those with a hook are where the kernel
// begins; the others are one service's each, found by its protocol and port in
// one step however many there are. Every packet of the host passes the former,
// so they are short.
type chain struct {
	name  string
	hook  *nftables.ChainHook // nil: reached from another
	kind  nftables.ChainType
	rules [][]expr.Any
}

// chains are all of the table's.
func (s Spec) chains(of sets) []chain {
	h := headerOf(s.V6)
	out := chain{name: "out", hook: nftables.ChainHookOutput, kind: nftables.ChainTypeRoute, rules: [][]expr.Any{
		rule(marked(), proceed(ownChain)),
		rule(service(dportOffset, of.out)),
		rule(within(h.src, s.Range()), untracked()),
		rule(within(h.dst, s.Range()), untracked()),
	}}
	in := chain{name: "in", hook: nftables.ChainHookInput, kind: nftables.ChainTypeFilter, rules: [][]expr.Any{
		rule(notLoopback(expr.MetaKeyIIF), proceed(outsideChain)),
		rule(within(h.src, s.Range()), service(sportOffset, of.in)),
		rule(is(expr.MetaKeyL4PROTO, h.icmp), proceed(unreachableChain)),
	}}
	post := chain{name: "post", hook: nftables.ChainHookPostrouting, kind: nftables.ChainTypeFilter, rules: [][]expr.Any{
		rule(notLoopback(expr.MetaKeyOIF), proceed(leavingChain)),
	}}
	services := []chain{s.own(), s.unreachable(h, of), s.outside(h), s.leaving(h), s.quoting(h, of)}
	for _, p := range s.Ports {
		services = append(services, s.outward(h, p, of))
		if !p.Packet {
			services = append(services, s.inward(h, p, of))
		}
	}
	return append(services, out, in, post)
}

const ownChain = "out_own"

// own is for what the sidecar itself sends. Its packets for the server have the
// addresses of peers from the start, as their socket is transparent (ip(7),
// IP_TRANSPARENT), and get the port of the service, which is the server's own and
// cannot be bound. That needs no second look at the routing table, and corrects no
// checksum, which is not there yet. Its connections to others pass as they are.
func (s Spec) own() chain {
	c := chain{name: ownChain}
	for _, p := range s.Ports {
		if proto, checksum := transport(p.Packet); p.Packet {
			c.rules = append(c.rules, rule(is(expr.MetaKeyL4PROTO, proto), equals(th, sportOffset, port(p.Voice)...),
				setPort(sportOffset, p.Service, checksum), untracked(), accept()))
		}
	}
	return c
}

const outsideChain = "in_outside"

// outside is for what comes by any interface but loopback. Nothing of that
// reaches an endpoint: who could would speak in the server's name; and nothing
// comes from one: who could would have the server's answer carried. That the range
// is local keeps nobody out: IPv6's is routed, and IPv4's is on hosts with
// route_localnet.
func (s Spec) outside(h header) chain {
	c := chain{name: outsideChain, rules: [][]expr.Any{
		rule(within(h.dst, s.Range()), drop()),
		rule(within(h.src, s.Range()), drop()),
	}}
	for _, p := range s.Ports {
		proto, _ := transport(p.Packet)
		c.rules = append(c.rules, rule(is(expr.MetaKeyL4PROTO, proto), equals(th, dportOffset, port(p.Endpoint)...), drop()))
		if p.Packet {
			c.rules = append(c.rules, rule(is(expr.MetaKeyL4PROTO, proto), equals(th, dportOffset, port(p.Voice)...), drop()))
		}
	}
	return c
}

// service goes to the chain of the service whose protocol and port a packet has.
func service(portOffset uint32, chains *nftables.Set) part {
	const proto, port = unix.NFT_REG32_00, unix.NFT_REG32_01 // together one key, and the first half of reg1
	return append(append(part{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: proto}}, load(th, portOffset, 2, port)...),
		&expr.Lookup{SourceRegister: proto, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: chains.Name, SetID: chains.ID})
}

// entry is the way to a service's chain.
func entry(proto byte, field uint16, chain string) nftables.SetElement {
	return nftables.SetElement{
		Key:         append([]byte{proto, 0, 0, 0}, append(port(field), 0, 0)...),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain},
	}
}

// entries are the ways to all services' chains, outward and inward. Packets have
// none inward: they come from the peers' own addresses.
func (s Spec) entries() (out, in []nftables.SetElement) {
	for _, p := range s.Ports {
		proto, _ := transport(p.Packet)
		out = append(out, entry(proto, p.Service, p.chain("out")))
		if !p.Packet {
			in = append(in, entry(proto, p.Endpoint, p.chain("in")))
		}
	}
	return out, in
}

func (p Port) chain(direction string) string {
	kind := "tcp"
	if p.Packet {
		kind = "udp"
	}
	return fmt.Sprintf("%s_%s_%d", direction, kind, p.Service)
}

// outward is for what leaves for a service's port: what goes to a peer is turned
// to the peer's endpoint, what goes to one that is lost is refused, and neither
// is tracked. The connections that the sidecar makes to the server, from
// endpoints, pass.
func (s Spec) outward(h header, p Port, of sets) chain {
	_, checksum := transport(p.Packet)
	c := chain{name: p.chain("out")}
	if !p.Packet {
		c.rules = append(c.rules, rule(within(h.src, s.Range()), untracked(), accept()))
	}
	turn := rule(h.find(h.dst, of.peers, reg1), h.setAddress(h.dst, reg1), setPort(dportOffset, p.Endpoint, checksum), untracked(), accept())
	c.rules = append(c.rules, turn,
		rule(h.find(h.dst, of.lost, 0), untracked(), h.refuse(p.Packet)),
		turn) // an address that passed from lost to peers between the two
	return c
}

// inward is for what comes from the endpoints of a stream service: it comes from
// the peers.
func (s Spec) inward(h header, p Port, of sets) chain {
	_, checksum := transport(p.Packet)
	return chain{name: p.chain("in"), rules: [][]expr.Any{
		rule(h.find(h.src, of.back, reg1), setPort(sportOffset, p.Service, checksum), h.setAddress(h.src, reg1)),
	}}
}

const unreachableChain = "in_unreachable"

// unreachable makes the kernel's own answer to a packet for an endpoint without a
// socket one to the packet that the server sent: where no sidecar runs, the
// server learns at once that it is refused. TCP is answered with a reset, which
// comes from the endpoint as all else does.
func (s Spec) unreachable(h header, of sets) chain {
	c := chain{name: unreachableChain}
	for _, p := range s.Ports {
		if !p.Packet {
			continue
		}
		c.rules = append(c.rules, rule(equals(th, 0, h.unreachable, h.portUnreachable), h.quotes(p.Packet, dportOffset, p.Endpoint),
			append(load(th, icmpHeader+h.dst, h.size, reg1), lookup(of.back, reg1)), // IPv6 does not send from an endpoint's address
			store(th, icmpHeader+h.dst, h.size, reg1, icmpChecksum, 0), setPort(icmpHeader+h.length+dportOffset, p.Service, icmpChecksum),
			h.setAddress(h.src, reg1)))
	}
	return c
}

// quotes matches an error message about a packet without options that has a port.
func (h header) quotes(packet bool, portOffset uint32, p uint16) part {
	proto, _ := transport(packet)
	var whole part
	if h.first != 0 {
		whole = equals(th, icmpHeader, h.first)
	}
	return rule(whole, equals(th, icmpHeader+h.next, proto), equals(th, icmpHeader+h.length+portOffset, port(p)...))
}

const (
	leavingChain = "post_leaving"
	quotingChain = "post_quoting"
)

// leaving is for what leaves by any interface but loopback. What was turned does
// not, as it would where the range is not local any more (IPv6's is not after `ip
// link set lo down`), or from a socket that is bound to another interface; nor
// does what the sidecar sends to the server in a peer's name, as it would where
// the server's address is this host's no more.
func (s Spec) leaving(h header) chain {
	return chain{name: leavingChain, rules: [][]expr.Any{
		rule(within(h.dst, s.Range()), drop()),
		rule(marked(), is(expr.MetaKeyL4PROTO, unix.IPPROTO_UDP), drop()),
		rule(is(expr.MetaKeyL4PROTO, h.icmp), is(expr.MetaKeyIIF, 0, 0, 0, 0), proceed(quotingChain)), // none: it is made here
	}}
}

// quoting keeps error messages in that quote what came through the sidecar: as
// that has its peer's address, the kernel's answer to a packet for a server that
// is down, or a firewall's that rejects it, would leave for the peer and show it
// to the network. Of fragments nobody knows the ports.
func (s Spec) quoting(h header, of sets) chain {
	const reassembly = 1 // the code of "time exceeded" for fragments that were missed
	c := chain{name: quotingChain}
	for _, set := range []*nftables.Set{of.peers, of.lost} {
		to := h.find(h.dst, set, reg1)
		c.rules = append(c.rules, rule(equals(th, 0, h.exceeded, reassembly), to, drop()))
		for _, p := range s.Ports {
			c.rules = append(c.rules, rule(equals(th, 0, h.unreachable), h.quotes(p.Packet, sportOffset, p.Service), to, drop()))
		}
	}
	return c
}
