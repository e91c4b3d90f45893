package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"culvert/internal/iproute"
)

const (
	// budget bounds one exchange with the kernel.
	budget = 10 * time.Second
	// netlinkBuffer holds a transaction that names thousands of peers.
	netlinkBuffer = 8 << 20
	// chunk is how many elements go into one message, whose attributes may be
	// 64 KiB long together.
	chunk = 100
)

var (
	// ErrNoTable is a table that is not there.
	ErrNoTable = errors.New("no such table")
	// ErrDamaged is a table that has lost rules or maps, or never had them all.
	ErrDamaged = errors.New("table is not as it was made")
	// ErrPermission is a process without CAP_NET_ADMIN.
	ErrPermission error = &hinted{
		"the kernel's rules are not this process's to see or change: it lacks CAP_NET_ADMIN",
		"run as root, or give it the capability: AmbientCapabilities=CAP_NET_ADMIN in a systemd unit, --cap-add NET_ADMIN for a container, " +
			"`setpriv --inh-caps +net_admin --ambient-caps +net_admin` by hand",
	}
	// ErrUnsupported is a kernel without nftables, or without a part of it that
	// is needed here.
	ErrUnsupported error = &hinted{
		"the kernel has no nftables, or not all of it that is needed",
		`load the modules nf_tables, nft_reject_ipv4 and nft_reject_ipv6 (Linux 5.2 or later), or use capture = "bind"`,
	}
)

// A hinted error has a remedy.
type hinted struct{ text, hint string }

func (e *hinted) Error() string { return e.text }

// Hint returns the remedy.
func (e *hinted) Hint() string { return e.hint }

func dial() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(netlinkBuffer), c.SetReadBuffer(netlinkBuffer), c.SetDeadline(time.Now().Add(budget)))
	}))
}

// plain turns an error of the kernel's into one that tells what is missing.
func plain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return ErrPermission
	case errors.Is(err, syscall.EPROTONOSUPPORT), errors.Is(err, syscall.EAFNOSUPPORT), errors.Is(err, syscall.EOPNOTSUPP):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// sets are a table's own, by name.
type sets struct {
	peers, back, lost *nftables.Set
	out, in           *nftables.Set // chains, by protocol and port
}

func (t *Table) table() *nftables.Table {
	return &nftables.Table{Family: headerOf(t.spec.V6).family, Name: t.Name()}
}

func (t *Table) sets() sets {
	of := t.table()
	addr := nftables.TypeIPAddr
	if t.spec.V6 {
		addr = nftables.TypeIP6Addr
	}
	service := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	// The identifiers count within one transaction. The library would give them
	// out of one counter for the whole process, without a lock.
	return sets{
		peers: &nftables.Set{Table: of, Name: "peers", ID: 1, IsMap: true, KeyType: addr, DataType: addr},
		back:  &nftables.Set{Table: of, Name: "back", ID: 2, IsMap: true, KeyType: addr, DataType: addr},
		lost:  &nftables.Set{Table: of, Name: "lost", ID: 3, KeyType: addr},
		out:   &nftables.Set{Table: of, Name: "services", ID: 4, IsMap: true, Concatenation: true, KeyType: service, DataType: nftables.TypeVerdict},
		in:    &nftables.Set{Table: of, Name: "endpoints", ID: 5, IsMap: true, Concatenation: true, KeyType: service, DataType: nftables.TypeVerdict},
	}
}

// Read returns what the kernel holds. The error is [ErrNoTable] where there is
// no table, and [ErrDamaged], beside what could be read, where it is not whole.
func (t *Table) Read() (State, error) {
	s := State{Peers: make(map[netip.Addr]Peer), Lost: make(map[netip.Addr]string)}
	c, err := dial()
	if err != nil {
		return s, plain(err)
	}
	e, err := t.read(c)
	if err != nil {
		return s, err
	}
	whole := len(e.back) == len(e.peers)
	for at, p := range e.peers {
		s.Peers[at] = Peer{Endpoint: p.value, Name: p.name}
		whole = whole && e.back[p.value].value == at
	}
	for at, l := range e.lost {
		s.Lost[at] = l.name
	}
	rules, err := t.hasRules(c)
	if err != nil {
		return s, fmt.Errorf("read the rules of table %s: %w", t.Name(), plain(err))
	}
	services, err := t.hasServices(c)
	if err != nil {
		return s, fmt.Errorf("read the services of table %s: %w", t.Name(), plain(err))
	}
	if !whole || !rules || !services || t.spec.V6 && iproute.Local(Range6.Addr().Next()) != nil {
		return s, ErrDamaged
	}
	return s, nil
}

// read returns the elements of the table's maps and sets, as they are.
func (t *Table) read(c *nftables.Conn) (elements, error) {
	e := elements{make(map[netip.Addr]element), make(map[netip.Addr]element), make(map[netip.Addr]element)}
	if _, err := c.ListTableOfFamily(t.Name(), t.table().Family); err != nil {
		if errors.Is(err, syscall.ENOENT) {
			return e, ErrNoTable
		}
		return e, fmt.Errorf("read table %s: %w", t.Name(), plain(err))
	}
	of := t.sets()
	for _, m := range []struct {
		set  *nftables.Set
		into map[netip.Addr]element
	}{{of.peers, e.peers}, {of.back, e.back}, {of.lost, e.lost}} {
		found, err := elementsOf(c, m.set)
		if err != nil {
			return e, fmt.Errorf("read %s of table %s: %w", m.set.Name, t.Name(), plain(err))
		}
		for _, f := range found {
			key, _ := netip.AddrFromSlice(f.Key)
			value, _ := netip.AddrFromSlice(f.Val)
			m.into[key] = element{value, f.Comment}
		}
	}
	return e, nil
}

// hasRules tells whether all chains have as many rules as they were made with,
// as far as that is known.
func (t *Table) hasRules(c *nftables.Conn) (bool, error) {
	if len(t.spec.Ports) == 0 {
		return true, nil
	}
	for _, want := range t.spec.chains(t.sets()) {
		rules, err := c.GetRules(t.table(), &nftables.Chain{Name: want.name})
		if errors.Is(err, syscall.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if len(rules) != len(want.rules) {
			return false, nil
		}
	}
	return true, nil
}

// hasServices tells whether the ways to all services' chains are there, as far as
// that is known.
func (t *Table) hasServices(c *nftables.Conn) (bool, error) {
	if len(t.spec.Ports) == 0 {
		return true, nil
	}
	of := t.sets()
	out, in := t.spec.entries()
	for _, m := range []struct {
		set  *nftables.Set
		want []nftables.SetElement
	}{{of.out, out}, {of.in, in}} {
		found, err := elementsOf(c, m.set)
		if err != nil {
			return false, err
		}
		if len(found) != len(m.want) {
			return false, nil
		}
		for _, w := range m.want {
			if !slices.ContainsFunc(found, func(f nftables.SetElement) bool { return slices.Equal(f.Key, w.Key) }) {
				return false, nil
			}
		}
	}
	return true, nil
}

// elementsOf are the elements of a set, none if it is not there.
func elementsOf(c *nftables.Conn, set *nftables.Set) ([]nftables.SetElement, error) {
	found, err := c.GetSetElements(set)
	if errors.Is(err, syscall.ENOENT) {
		return nil, nil
	}
	return found, err
}

// Services are the ports whose traffic the table takes, without the ports of
// their endpoints.
func (t *Table) Services() ([]Port, error) {
	c, err := dial()
	if err != nil {
		return nil, plain(err)
	}
	found, err := elementsOf(c, t.sets().out)
	if err != nil {
		return nil, fmt.Errorf("read the services of table %s: %w", t.Name(), plain(err))
	}
	var ports []Port
	for _, e := range found {
		if len(e.Key) == len(entry(0, 0, "").Key) {
			ports = append(ports, Port{Packet: e.Key[0] == unix.IPPROTO_UDP, Service: binary.BigEndian.Uint16(e.Key[4:])})
		}
	}
	return ports, nil
}

// Replace makes the table hold s and nothing else, whether it was there or not,
// in one transaction. Where it was, its chains and its elements that stay are
// kept: a table that is deleted and made anew in one transaction lets single
// packets pass between the two.
func (t *Table) Replace(s State) error {
	if t.spec.V6 {
		if err := iproute.AddLocal(Range6); err != nil {
			return plain(err)
		}
	}
	c, err := dial()
	if err != nil {
		return plain(err)
	}
	found, err := t.read(c)
	switch {
	case errors.Is(err, ErrNoTable):
	case err != nil:
		return err
	case t.inPlace(found, s.elements()) == nil:
		return nil
	}
	// There may be none to delete. One of the other family is of a sidecar that
	// this one takes the place of.
	other := New(Spec{Listen: t.spec.Listen, V6: !t.spec.V6})
	for _, old := range []*nftables.Table{t.table(), other.table()} {
		c.AddTable(old)
		c.DelTable(old)
	}
	if err := t.describe(c, elements{}, s.elements()); err != nil {
		return err
	}
	return t.install(c)
}

// inPlace changes the table that is there from what was found in it. It fails
// where that is not of this kind.
func (t *Table) inPlace(found, wanted elements) error {
	c, err := dial()
	if err != nil {
		return plain(err)
	}
	of := t.sets()
	for _, set := range []*nftables.Set{of.out, of.in} {
		stale, err := elementsOf(c, set)
		if err != nil {
			return err
		}
		if len(stale) == 0 {
			continue
		}
		if err := c.SetDeleteElements(set, stale); err != nil {
			return err
		}
	}
	if err := t.describe(c, found, wanted); err != nil {
		return err
	}
	if err := t.dropChains(c); err != nil {
		return err
	}
	return t.install(c)
}

// dropChains deletes the chains of services that are none any more.
func (t *Table) dropChains(c *nftables.Conn) error {
	there, err := c.ListChainsOfTableFamily(t.table().Family)
	if err != nil {
		return err
	}
	wanted := t.spec.chains(t.sets())
	for _, old := range there {
		if old.Table.Name == t.Name() && !slices.ContainsFunc(wanted, func(w chain) bool { return w.name == old.Name }) {
			c.FlushChain(old)
			c.DelChain(old)
		}
	}
	return nil
}

func (t *Table) install(c *nftables.Conn) error {
	err := c.Flush()
	if errors.Is(err, syscall.ENOENT) { // an expression that this kernel does not have
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if err != nil {
		return fmt.Errorf("install table %s: %w", t.Name(), plain(err))
	}
	return nil
}

// describe adds all that the table has, where it holds the elements of one state,
// and makes them another's. What is there already stays.
func (t *Table) describe(c *nftables.Conn, from, to elements) error {
	table, of := c.AddTable(t.table()), t.sets()
	for _, set := range []*nftables.Set{of.peers, of.back, of.lost, of.out, of.in} {
		if err := c.AddSet(set, nil); err != nil {
			return fmt.Errorf("describe %s: %w", set.Name, err)
		}
	}
	if err := of.change(c, from, to); err != nil {
		return err
	}
	chains := t.spec.chains(of)
	added := make([]*nftables.Chain, len(chains))
	for i, want := range chains {
		added[i] = &nftables.Chain{Table: table, Name: want.name}
		if want.hook != nil {
			added[i].Hooknum, added[i].Type, added[i].Priority = want.hook, want.kind, nftables.ChainPriorityRef(priority)
		}
		c.AddChain(added[i])
		c.FlushChain(added[i])
	}
	out, in := t.spec.entries()
	if err := errors.Join(c.SetAddElements(of.out, out), c.SetAddElements(of.in, in)); err != nil {
		return fmt.Errorf("describe the services: %w", err)
	}
	for i, want := range chains {
		for _, exprs := range want.rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: added[i], Exprs: exprs})
		}
	}
	return nil
}

// Change takes the table from one state to another in one transaction, and
// touches nothing that both have. The table must hold from.
func (t *Table) Change(from, to State) error {
	c, err := dial()
	if err != nil {
		return plain(err)
	}
	if err := t.sets().change(c, from.elements(), to.elements()); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change table %s: %w", t.Name(), plain(err))
	}
	return nil
}

// change adds what takes the elements from old to now. Deletions come first, so that an address
// or an endpoint can pass from one peer to another.
func (s sets) change(c *nftables.Conn, old, now elements) error {
	for _, way := range []struct {
		do        func(*nftables.Set, []nftables.SetElement) error
		minus, of elements
	}{{c.SetDeleteElements, now, old}, {c.SetAddElements, old, now}} {
		for _, set := range []struct {
			set       *nftables.Set
			minus, of map[netip.Addr]element
		}{
			{s.peers, way.minus.peers, way.of.peers},
			{s.back, way.minus.back, way.of.back},
			{s.lost, way.minus.lost, way.of.lost},
		} {
			for some := range slices.Chunk(difference(set.of, set.minus), chunk) {
				if err := way.do(set.set, some); err != nil {
					return fmt.Errorf("describe elements of %s: %w", set.set.Name, err)
				}
			}
		}
	}
	return nil
}

// An element of a map or a set is what belongs to its key.
type element struct {
	value netip.Addr // of a map
	name  string
}

type elements struct{ peers, back, lost map[netip.Addr]element }

func (s State) elements() elements {
	e := elements{make(map[netip.Addr]element), make(map[netip.Addr]element), make(map[netip.Addr]element)}
	for at, p := range s.Peers {
		e.peers[at] = element{p.Endpoint, p.Name}
		e.back[p.Endpoint] = element{at, p.Name}
	}
	for at, name := range s.Lost {
		e.lost[at] = element{name: name}
	}
	return e
}

// difference is what is in a and not the same in b, in the order of keys.
func difference(a, b map[netip.Addr]element) []nftables.SetElement {
	var d []nftables.SetElement
	for _, key := range slices.SortedFunc(maps.Keys(a), netip.Addr.Compare) {
		if other, there := b[key]; there && other == a[key] {
			continue
		}
		d = append(d, nftables.SetElement{Key: key.AsSlice(), Val: a[key].value.AsSlice(), Comment: Label(a[key].name)})
	}
	return d
}

// Delete takes the table away. What leaves for a peer then leaves plainly. It is
// no error if there is none.
func (t *Table) Delete() error {
	c, err := dial()
	if err != nil {
		return plain(err)
	}
	c.DelTable(t.table())
	if err := c.Flush(); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("delete table %s: %w", t.Name(), plain(err))
	}
	if t.spec.V6 {
		return releaseRange6()
	}
	return nil
}

// releaseRange6 undoes what Replace does beside the table, unless a table is
// left that needs it.
func releaseRange6() error {
	ports, err := Tables()
	if err != nil {
		return err
	}
	for _, port := range ports {
		if t, err := Find(port); err == nil && t.spec.V6 {
			return nil
		}
	}
	return plain(iproute.RemoveLocal(Range6))
}

// Find returns the table of the sidecar that listens on a port, as far as it can
// be known from its name: without the ports. The error is [ErrNoTable] where there
// is none.
func Find(listen uint16) (*Table, error) {
	c, err := dial()
	if err != nil {
		return nil, plain(err)
	}
	for _, v6 := range []bool{false, true} {
		t := New(Spec{Listen: listen, V6: v6})
		_, err := c.ListTableOfFamily(t.Name(), t.table().Family)
		if err == nil {
			return t, nil
		}
		if !errors.Is(err, syscall.ENOENT) {
			return nil, fmt.Errorf("look for table %s: %w", t.Name(), plain(err))
		}
	}
	return nil, ErrNoTable
}

// V6 tells whether the table is for servers with addresses of IPv6.
func (t *Table) V6() bool { return t.spec.V6 }

// Tables returns the listen ports of all sidecars that have a table here.
func Tables() ([]uint16, error) {
	c, err := dial()
	if err != nil {
		return nil, plain(err)
	}
	var ports []uint16
	for _, v6 := range []bool{false, true} {
		tables, err := c.ListTablesOfFamily(headerOf(v6).family)
		if err != nil {
			return nil, fmt.Errorf("list tables: %w", plain(err))
		}
		for _, t := range tables {
			if port, ok := Listen(t.Name); ok {
				ports = append(ports, port)
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}

// groupNFTables is the multicast group of changes to nftables (NFNLGRP_NFTABLES
// in linux/netfilter/nfnetlink.h).
const groupNFTables = 7

// A Watcher hears of every change of any table of the namespace.
type Watcher struct{ c *netlink.Conn }

// Watch returns a watcher.
func Watch() (*Watcher, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (groupNFTables - 1)})
	if err != nil {
		return nil, fmt.Errorf("watch nftables: %w", plain(err))
	}
	return &Watcher{c}, nil
}

// Wait returns after the next change, or with an error after Close. Changes that
// it had no time to hear of count as one.
func (w *Watcher) Wait() error {
	_, err := w.c.Receive()
	if errors.Is(err, syscall.ENOBUFS) {
		return nil
	}
	return err
}

// Close ends a Wait.
func (w *Watcher) Close() error { return w.c.Close() }
