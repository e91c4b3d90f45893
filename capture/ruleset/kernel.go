package ruleset

import (
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
		`load the modules nf_tables and nft_reject_inet (Linux 5.2 or later), or use capture = "bind"`,
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
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: t.Name()}
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
	if _, err := c.ListTableOfFamily(t.Name(), nftables.TableFamilyINet); err != nil {
		if errors.Is(err, syscall.ENOENT) {
			return s, ErrNoTable
		}
		return s, fmt.Errorf("read table %s: %w", t.Name(), plain(err))
	}
	whole, err := t.hasRules(c)
	if err != nil {
		return s, fmt.Errorf("read the rules of table %s: %w", t.Name(), plain(err))
	}
	whole = whole && (!t.spec.V6 || iproute.Local(Range6.Addr().Next()) == nil)
	sets := t.sets()
	back := make(map[netip.Addr]netip.Addr)
	for _, set := range []*nftables.Set{sets.peers, sets.back, sets.lost} {
		elements, err := c.GetSetElements(set)
		if err != nil {
			if !errors.Is(err, syscall.ENOENT) {
				return s, fmt.Errorf("read %s of table %s: %w", set.Name, t.Name(), plain(err))
			}
			whole = false
		}
		for _, e := range elements {
			key, _ := netip.AddrFromSlice(e.Key)
			value, _ := netip.AddrFromSlice(e.Val)
			switch set {
			case sets.peers:
				s.Peers[key] = Peer{Endpoint: value, Name: e.Comment}
			case sets.back:
				back[key] = value
			default:
				s.Lost[key] = e.Comment
			}
		}
	}
	for at, p := range s.Peers {
		whole = whole && back[p.Endpoint] == at
	}
	if !whole || len(back) != len(s.Peers) {
		return s, ErrDamaged
	}
	return s, nil
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

// Replace makes the table hold s and nothing else, whether it was there or not,
// in one transaction.
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
	table := c.AddTable(t.table()) // there may be none to delete
	c.DelTable(table)
	c.AddTable(table)
	sets := t.sets()
	if err := t.describe(c, table, sets); err != nil {
		return err
	}
	if err := sets.change(c, State{}, s); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		if errors.Is(err, syscall.ENOENT) { // an expression that this kernel does not have
			err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return fmt.Errorf("install table %s: %w", t.Name(), plain(err))
	}
	return nil
}

// describe adds what a table without peers has.
func (t *Table) describe(c *nftables.Conn, table *nftables.Table, of sets) error {
	for _, set := range []*nftables.Set{of.peers, of.back, of.lost, of.out, of.in} {
		if err := c.AddSet(set, nil); err != nil {
			return fmt.Errorf("describe %s: %w", set.Name, err)
		}
	}
	chains := t.spec.chains(of)
	added := make([]*nftables.Chain, len(chains))
	for i, want := range chains {
		added[i] = &nftables.Chain{Table: table, Name: want.name}
		if want.hook != nil {
			added[i].Hooknum, added[i].Type, added[i].Priority = want.hook, want.kind, nftables.ChainPriorityRef(priority)
		}
		c.AddChain(added[i])
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
	if err := t.sets().change(c, from, to); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change table %s: %w", t.Name(), plain(err))
	}
	return nil
}

// change adds what takes from to to. Deletions come first, so that an address
// or an endpoint can pass from one peer to another.
func (s sets) change(c *nftables.Conn, from, to State) error {
	old, now := from.elements(), to.elements()
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
// be known from what is there: without the ports. The error is [ErrNoTable] where
// there is none.
func Find(listen uint16) (*Table, error) {
	t := New(Spec{Listen: listen})
	c, err := dial()
	if err != nil {
		return nil, plain(err)
	}
	peers, err := c.GetSetByName(t.table(), t.sets().peers.Name)
	if errors.Is(err, syscall.ENOENT) {
		return nil, ErrNoTable
	}
	if err != nil {
		return nil, fmt.Errorf("look at table %s: %w", t.Name(), plain(err))
	}
	t.spec.V6 = peers.KeyType.Bytes == nftables.TypeIP6Addr.Bytes
	return t, nil
}

// Tables returns the listen ports of all sidecars that have a table here.
func Tables() ([]uint16, error) {
	c, err := dial()
	if err != nil {
		return nil, plain(err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", plain(err))
	}
	var ports []uint16
	for _, t := range tables {
		if port, ok := Listen(t.Name); ok {
			ports = append(ports, port)
		}
	}
	slices.Sort(ports)
	return ports, nil
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
