package federation

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"culvert/federation/state"
)

// An Accept bounds what the entries of one datacenter may point at. A list that
// is empty bounds nothing.
type Accept struct {
	Datacenter string
	Advertise  []netip.Prefix // of servers
	Gateways   []netip.Prefix // the WAN addresses of gateways
}

// A Claim is an address that this process's configuration gives to a server.
type Claim struct {
	Datacenter, Node string
	Advertise        netip.Addr
}

// ReaderOptions say who reads records, and what it trusts them with.
type ReaderOptions struct {
	// Datacenter and Node are the reader's own; Node is "" in a gateway.
	Datacenter, Node string
	// Services are those of the reader's own configuration. An entry opens no
	// other port. A gateway has none, and takes no peers.
	Services []state.Service
	// Virtual allows addresses of 127.0.0.0/8 for servers, but those of
	// 127.0.0.0/24: `bind` makes virtual addresses of them.
	Virtual bool
	// Advertise is the address of the reader's own server, which nobody else
	// may have.
	Advertise netip.Addr
	// LAN is the reader's own address in its datacenter. The network that it
	// belongs to is no place for another datacenter's gateways. An invalid one
	// bounds nothing.
	LAN netip.Addr
	// Claims are the servers of the configuration, which wins.
	Claims []Claim
	// Accept are the bounds of single datacenters.
	Accept []Accept
	// Local returns the addresses of this host. Nil asks the kernel.
	Local func() ([]LocalAddr, error)
}

// A LocalAddr is an address of this host with its network.
type LocalAddr struct {
	netip.Prefix
	Loopback bool // it is on the loopback interface
}

// A Peer is a server that a reader takes from the records.
type Peer struct {
	Datacenter, Node string
	Advertise        netip.Addr
	Address          string // of its sidecar
	Critical         bool   // its lease ran out
}

// A View is what a reader takes from the records.
type View struct {
	Peers []Peer // in the order of datacenter and node, without the reader itself
	// Gateways are the LAN addresses of the own datacenter's gateways.
	Gateways []string
	// Datacenters are the WAN addresses of the others' gateways, by datacenter;
	// a datacenter without gateways has an empty list.
	Datacenters map[string][]string
	// Refused are the entries, or parts of entries, that were kept out.
	Refused []Refusal
}

// followEvery is how often records are looked at again though nothing has changed
// in them: an address that could not be had may be free by then, and this host's
// own may be others.
const followEvery = 30 * time.Second

// Follow calls take at once, at each change of a source, and now and then, until
// ctx ends.
func Follow(ctx context.Context, source Source, take func()) {
	again := time.NewTicker(followEvery)
	defer again.Stop()
	for {
		changed := source.Changed()
		take()
		select {
		case <-changed:
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// A Refusal is something in a record that a reader does not take.
type Refusal struct {
	Key state.Key `json:"entry"`
	Why string    `json:"why"`
}

func (r Refusal) String() string { return r.Key.String() + ": " + r.Why }

// A Reader makes views of states. View is for one goroutine, Forbid for any
// number.
type Reader struct {
	o       ReaderOptions
	holders map[netip.Addr]state.Key // as of the last view: who has an address keeps it
}

// NewReader returns a reader that has read nothing.
func NewReader(o ReaderOptions) *Reader {
	if o.Local == nil {
		o.Local = (&hostAddrs{}).get
	}
	return &Reader{o: o}
}

// Reconfigured returns a reader with other options that remembers who has which
// address.
func (r *Reader) Reconfigured(o ReaderOptions) *Reader {
	next := NewReader(o)
	next.holders = maps.Clone(r.holders)
	return next
}

// View returns what a state gives to the reader. An error is the host's, which
// does not tell its addresses.
func (r *Reader) View(s *state.State) (View, error) {
	local, err := r.o.Local()
	if err != nil {
		return View{}, fmt.Errorf("ask for this host's addresses: %w", err)
	}
	v := &viewing{
		Reader: r, state: s, local: local, View: View{Datacenters: make(map[string][]string)},
		taken: make(map[netip.Addr]state.Key), claimed: make(map[state.Key]netip.Addr),
	}
	for _, c := range r.o.Claims {
		k := state.Key{Datacenter: c.Datacenter, Kind: state.KindServer, Name: c.Node}
		v.taken[c.Advertise], v.claimed[k] = k, c.Advertise
	}
	for _, record := range r.inOrder(s) {
		v.servers(record)
		v.gateways(record)
	}
	r.holders = maps.Clone(v.taken)
	slices.SortFunc(v.Peers, func(a, b Peer) int {
		return cmp.Or(cmp.Compare(a.Datacenter, b.Datacenter), cmp.Compare(a.Node, b.Node))
	})
	return v.View, nil
}

// inOrder has the own datacenter's record first: what others claim of its
// addresses they do not get.
func (r *Reader) inOrder(s *state.State) []*state.Record {
	records := s.Records()
	slices.SortStableFunc(records, func(a, b *state.Record) int {
		own := func(x *state.Record) int {
			if x.Datacenter == r.o.Datacenter {
				return 0
			}
			return 1
		}
		return cmp.Compare(own(a), own(b))
	})
	return records
}

// viewing is one View under way.
type viewing struct {
	*Reader
	View
	state   *state.State
	local   []LocalAddr
	taken   map[netip.Addr]state.Key
	claimed map[state.Key]netip.Addr // by the configuration
}

func (v *viewing) refuse(k state.Key, format string, args ...any) {
	v.Refused = append(v.Refused, Refusal{k, fmt.Sprintf(format, args...)})
}

func (v *viewing) servers(r *state.Record) {
	for _, s := range r.Servers {
		k := state.Key{Datacenter: r.Datacenter, Kind: state.KindServer, Name: s.Node}
		if r.Datacenter == v.o.Datacenter && s.Node == v.o.Node {
			continue
		}
		why := v.server(k, s)
		if why == "" && r.Datacenter == v.o.Datacenter {
			why = v.sibling(s.Address)
		}
		if why != "" {
			v.refuse(k, "%s", why)
			continue
		}
		p := Peer{k.Datacenter, k.Name, s.Advertise, s.Address, s.Health == state.Critical}
		if claimed, ok := v.claimed[k]; ok {
			if claimed != s.Advertise {
				v.refuse(k, "its address %s is not taken: the configuration says %s", s.Advertise, claimed)
			}
			p.Advertise = claimed
		}
		v.taken[p.Advertise] = k
		v.Peers = append(v.Peers, p)
	}
}

// server tells why a server is kept out, "" if it is not.
func (v *viewing) server(k state.Key, s state.Server) string {
	if len(v.o.Services) > 0 {
		if why := v.services(s); why != "" {
			return why
		}
		if _, claimed := v.claimed[k]; claimed {
			return "" // the configuration says where it is
		}
		if why := v.address(k, s.Advertise); why != "" {
			return fmt.Sprintf("its address %s %s", s.Advertise, why)
		}
	}
	return ""
}

// services holds an entry against the reader's own services: one has one port
// in the whole federation.
func (v *viewing) services(s state.Server) string {
	common := 0
	for _, theirs := range s.Services {
		i := slices.IndexFunc(v.o.Services, func(own state.Service) bool { return own.Name == theirs.Name })
		if i < 0 {
			continue // nothing of ours has that name: no port is opened for it
		}
		own := v.o.Services[i]
		if own.Kind != theirs.Kind || own.Port != theirs.Port {
			return fmt.Sprintf("its service %s is %s on port %d, and here it is %s on port %d", theirs.Name, theirs.Kind, theirs.Port, own.Kind, own.Port)
		}
		common++
	}
	if common == 0 {
		return fmt.Sprintf("it has no service in common with this sidecar, which has %s", names(v.o.Services))
	}
	return ""
}

func names(services []state.Service) string {
	out := make([]string, len(services))
	for i, s := range services {
		out[i] = s.Name
	}
	return strings.Join(out, ", ")
}

// address tells what is wrong with a server's address, "" if nothing is.
func (v *viewing) address(k state.Key, a netip.Addr) string {
	switch a {
	case v.o.Advertise:
		return "is that of this sidecar's own server"
	case v.o.LAN:
		return "is this sidecar's own"
	}
	if why := v.kindOf(a); why != "" {
		return why
	}
	if holder, ok := v.taken[a]; ok && holder != k {
		return fmt.Sprintf("is %s's", holder)
	}
	if holder, ok := v.holders[a]; ok && holder != k && v.stillClaims(holder, a) {
		return fmt.Sprintf("is %s's", holder)
	}
	for _, accept := range v.o.Accept {
		in := within(accept.Advertise, a)
		switch {
		case accept.Datacenter == k.Datacenter && len(accept.Advertise) > 0 && !in:
			return fmt.Sprintf("is outside what accept %q allows", accept.Datacenter)
		case accept.Datacenter != k.Datacenter && in:
			return fmt.Sprintf("is in the range of %s, by accept %q", accept.Datacenter, accept.Datacenter)
		}
	}
	return ""
}

// stillClaims tells whether who had an address before still has an entry with
// it: one that has gone keeps nothing.
func (v *viewing) stillClaims(holder state.Key, a netip.Addr) bool {
	record := v.state.Record(holder.Datacenter)
	if record == nil {
		return false
	}
	s, ok := record.Server(holder.Name)
	return ok && s.Advertise == a
}

func (v *viewing) kindOf(a netip.Addr) string {
	switch {
	case v.o.Virtual && virtual(a):
		return ""
	case a.IsLoopback():
		return "is a loopback address"
	case a.IsLinkLocalUnicast():
		return "is a link-local address"
	case !a.IsGlobalUnicast():
		return "is no address of a server"
	}
	for _, p := range v.local {
		if p.Addr() == a && (!p.Loopback || !v.o.Virtual) { // a virtual address may be on lo
			return "is this host's own"
		}
	}
	return ""
}

// virtual tells whether an address is one that `bind` makes virtual addresses of:
// those of 127.0.0.0/8, but for where hosts have their own services and for the
// broadcast address.
func virtual(a netip.Addr) bool {
	b := a.As16()
	return a.Is4() && a.IsLoopback() && (b[13] != 0 || b[14] != 0) && a != netip.AddrFrom4([4]byte{127, 255, 255, 255})
}

func within(ranges []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// sibling checks the address of a sidecar of the own datacenter, which is dialled
// directly.
func (v *viewing) sibling(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Sprintf("its sidecar's address %q is not host:port", address)
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return "" // a name
	}
	a = a.Unmap()
	if a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return fmt.Sprintf("its sidecar's address %s is none that can be dialled", a)
	}
	return ""
}

func (v *viewing) gateways(r *state.Record) {
	own := r.Datacenter == v.o.Datacenter
	if !own {
		v.Datacenters[r.Datacenter] = []string{}
	}
	for _, g := range r.Gateways {
		k := state.Key{Datacenter: r.Datacenter, Kind: state.KindGateway, Name: g.Name}
		if own {
			v.Gateways = append(v.Gateways, g.Address)
			continue
		}
		if why := v.gateway(k, g.WANAddress); why != "" {
			v.refuse(k, "its wan_address %s %s", g.WANAddress, why)
			continue
		}
		if all := v.Datacenters[r.Datacenter]; !slices.Contains(all, g.WANAddress) { // gateways may share a name
			v.Datacenters[r.Datacenter] = append(all, g.WANAddress)
		}
	}
}

// gateway tells why another datacenter's gateway is not dialled, "" if it is. A
// name is judged when it is dialled, by what it stands for then.
func (v *viewing) gateway(k state.Key, address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return "is not host:port"
	}
	a, err := netip.ParseAddr(host)
	accept := v.o.accept(k.Datacenter)
	switch a = a.Unmap(); {
	case err != nil && len(accept.Gateways) > 0:
		return fmt.Sprintf("is a name, and accept %q allows addresses: what it stands for then cannot be held against them", k.Datacenter)
	case err != nil:
		return ""
	case len(accept.Gateways) > 0 && !within(accept.Gateways, a):
		return fmt.Sprintf("is outside what accept %q allows", k.Datacenter)
	}
	return v.o.outside(a, v.local, accept.Gateways)
}

// accept returns the bounds of one datacenter.
func (o *ReaderOptions) accept(datacenter string) Accept {
	for _, a := range o.Accept {
		if a.Datacenter == datacenter {
			return a
		}
	}
	return Accept{Datacenter: datacenter}
}

// Forbid refuses addresses that another datacenter's records must not make
// anybody dial. It is for those that a name of theirs turns out to stand for.
func (r *Reader) Forbid(to netip.AddrPort) error {
	local, err := r.o.Local()
	if err != nil {
		return fmt.Errorf("ask for this host's addresses: %w", err)
	}
	var accepted []netip.Prefix // whose name it was is not known here
	for _, accept := range r.o.Accept {
		accepted = append(accepted, accept.Gateways...)
	}
	if why := r.o.outside(to.Addr().WithZone("").Unmap(), local, accepted); why != "" {
		return fmt.Errorf("%s %s", to.Addr(), why) //nolint:err113 // nobody branches on it
	}
	return nil
}

// outside tells why an address is none of another datacenter's gateways, "" if it
// may be. Those that are accepted may be inside the own network.
func (o *ReaderOptions) outside(a netip.Addr, local []LocalAddr, accepted []netip.Prefix) string {
	if a.IsLoopback() || a.IsLinkLocalUnicast() || !a.IsGlobalUnicast() {
		return "is no address that another datacenter can have"
	}
	for _, p := range local {
		if p.Addr() == a {
			return "is this host's own"
		}
	}
	if within(accepted, a) {
		return ""
	}
	for _, p := range local {
		if o.LAN.IsValid() && p.Addr() == o.LAN && p.Contains(a) {
			return fmt.Sprintf("is inside this datacenter's own network, %s, and no accept block has it among its gateways", p.Masked())
		}
	}
	return ""
}

// hostRefresh is how long the host's addresses are believed: asking for them costs
// as much as a dial.
const hostRefresh = 5 * time.Second

// hostAddrs are the addresses of this host.
type hostAddrs struct {
	mu    sync.Mutex
	asked time.Time
	addrs []LocalAddr
}

func (h *hostAddrs) get() ([]LocalAddr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.asked.IsZero() && time.Since(h.asked) < hostRefresh {
		return h.addrs, nil
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []LocalAddr
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			continue // it has gone meanwhile
		}
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			ip, _ := netip.AddrFromSlice(n.IP)
			ones, _ := n.Mask.Size()
			out = append(out, LocalAddr{netip.PrefixFrom(ip.Unmap(), ones), i.Flags&net.FlagLoopback != 0})
		}
	}
	h.addrs, h.asked = out, time.Now()
	return out, nil
}
