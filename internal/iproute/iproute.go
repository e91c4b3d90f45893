// Package iproute asks the kernel's routing tables about single addresses, and
// makes prefixes local (rtnetlink(7)).
//
//	if err := iproute.Local(addr); err != nil { ... } // EADDRNOTAVAIL: not ours
//	if err := iproute.Reachable(addr); err != nil { ... } // ENETUNREACH: no route
//
// The functions hold nothing and may be called from several goroutines. Asking
// needs no privilege, changing needs CAP_NET_ADMIN. The network namespace is
// that of the calling thread.
package iproute

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"
)

// budget bounds one exchange with the kernel, which answers at once as a rule.
const budget = 2 * time.Second

// Local tells whether the kernel delivers what is sent to addr to this host
// itself. It returns nil if so and [unix.EADDRNOTAVAIL] if not.
func Local(addr netip.Addr) error {
	return with(func(a *Asker) error { return a.Local(addr) })
}

// Reachable tells whether there is a route to addr. It returns nil if so, and
// what a process that sends there would be told otherwise, [unix.ENETUNREACH]
// as a rule.
func Reachable(addr netip.Addr) error {
	return with(func(a *Asker) error { return a.Reachable(addr) })
}

func with(f func(*Asker) error) error {
	a, err := Ask()
	if err != nil {
		return err
	}
	defer a.Close()
	return f(a)
}

// An Asker asks about many addresses over one connection to the kernel. It is
// for one goroutine.
type Asker struct{ c *netlink.Conn }

// Ask returns an asker. Who has it closes it.
func Ask() (*Asker, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("reach the routing tables: %w", err)
	}
	return &Asker{c}, nil
}

// Close ends the connection.
func (a *Asker) Close() { _ = a.c.Close() }

// Local is as [Local].
func (a *Asker) Local(addr netip.Addr) error {
	kind, err := a.typeOf(addr)
	if _, refused := errors.AsType[syscall.Errno](err); refused {
		return unix.EADDRNOTAVAIL // no route at all
	}
	if err != nil {
		return fmt.Errorf("ask for the route to %s: %w", addr, err)
	}
	if kind != unix.RTN_LOCAL {
		return unix.EADDRNOTAVAIL
	}
	return nil
}

// Reachable is as [Reachable].
func (a *Asker) Reachable(addr netip.Addr) error {
	_, err := a.typeOf(addr)
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}

// typeOf returns the type of the route to addr (RTM_GETROUTE, rtm_type).
func (a *Asker) typeOf(addr netip.Addr) (byte, error) {
	answer, err := a.execute(unix.RTM_GETROUTE, 0, route(addr, addr.BitLen(), 0))
	if err != nil {
		return 0, err
	}
	if len(answer) == 0 || len(answer[0].Data) < unix.SizeofRtMsg {
		return 0, fmt.Errorf("the kernel's answer about %s is too short", addr)
	}
	const typeOffset = 7 // rtm_type in struct rtmsg
	return answer[0].Data[typeOffset], nil
}

// AddLocal makes every address of the prefix local ("AnyIP": ip route add local
// PREFIX dev lo). It is no error if it is so already.
func AddLocal(p netip.Prefix) error {
	return changeLocal(p, unix.RTM_NEWROUTE, netlink.Create|netlink.Excl, syscall.EEXIST)
}

// RemoveLocal undoes [AddLocal]. It is no error if it is undone already.
func RemoveLocal(p netip.Prefix) error {
	return changeLocal(p, unix.RTM_DELROUTE, 0, syscall.ESRCH)
}

func changeLocal(p netip.Prefix, kind netlink.HeaderType, flags netlink.HeaderFlags, fine syscall.Errno) error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	err = with(func(a *Asker) error {
		_, err := a.execute(kind, flags|netlink.Acknowledge, route(p.Addr(), p.Bits(), lo.Index))
		return err
	})
	if err != nil && !errors.Is(err, fine) {
		return fmt.Errorf("make %s local: %w", p, err)
	}
	return nil
}

func (a *Asker) execute(kind netlink.HeaderType, flags netlink.HeaderFlags, body []byte) ([]netlink.Message, error) {
	if err := a.c.SetDeadline(time.Now().Add(budget)); err != nil {
		return nil, err
	}
	return a.c.Execute(netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request | flags}, Data: body})
}

// route builds a struct rtmsg and its attributes: a question about a
// destination, or, with an interface, a local route to it.
func route(dst netip.Addr, bits, oif int) []byte {
	b := make([]byte, unix.SizeofRtMsg)
	b[0] = unix.AF_INET6
	if dst.Is4() {
		b[0] = unix.AF_INET
	}
	b[1] = byte(bits) //nolint:gosec // 128 at the most
	attrs := []netlink.Attribute{{Type: unix.RTA_DST, Data: dst.AsSlice()}}
	if oif != 0 {
		b[4] = unix.RT_TABLE_LOCAL
		b[5] = unix.RTPROT_STATIC
		b[6] = unix.RT_SCOPE_HOST
		b[7] = unix.RTN_LOCAL
		attrs = append(attrs, netlink.Attribute{Type: unix.RTA_OIF, Data: nlenc.Uint32Bytes(uint32(oif))}) //nolint:gosec // an interface's index
	}
	encoded, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic("iproute: " + err.Error()) // attributes of fixed small sizes: a mistake in this file
	}
	return append(b, encoded...)
}
