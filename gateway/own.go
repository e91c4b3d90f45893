package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"culvert/internal/sockopt"
)

// errOwnAddress is the error of a dial to the gateway's own listener.
var errOwnAddress = errors.New("that is this gateway's own listener")

// ownRefresh is how long the host's addresses are believed: asking for them
// costs as much as the rest of a dial.
const ownRefresh = 10 * time.Second

// own knows the addresses that lead back to this gateway's listener.
type own struct {
	listen netip.AddrPort
	local  func() ([]net.Addr, error) // of the host's interfaces

	mu    sync.Mutex
	asked time.Time
	addrs map[netip.Addr]bool
}

func newOwn(listen net.Addr) *own {
	o := &own{local: net.InterfaceAddrs}
	if tcp, ok := listen.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		o.listen = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return o
}

// holds reports whether a connection to a would come in at the own listener.
func (o *own) holds(a netip.AddrPort) bool {
	if a.Port() != o.listen.Port() || !o.listen.IsValid() {
		return false
	}
	ip := a.Addr().Unmap().WithZone("")
	switch {
	case ip.IsUnspecified(): // dialling 0.0.0.0 reaches loopback
		return o.listen.Addr().IsUnspecified() || o.listen.Addr().IsLoopback()
	case !o.listen.Addr().IsUnspecified():
		return ip == o.listen.Addr().WithZone("")
	case ip.IsLoopback():
		return true
	}
	return o.hostHas(ip)
}

func (o *own) hostHas(ip netip.Addr) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); o.asked.IsZero() || now.Sub(o.asked) >= ownRefresh {
		addrs, err := o.local()
		if err != nil {
			return o.addrs[ip] // a loop that gets by is cut by its random
		}
		o.asked, o.addrs = now, make(map[netip.Addr]bool, len(addrs))
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if local, ok := netip.AddrFromSlice(n.IP); ok {
					o.addrs[local.Unmap()] = true
				}
			}
		}
	}
	return o.addrs[ip]
}

// check refuses an address that leads back here. Of the configuration's, names are
// left to those who dial: what they mean may change.
func (o *own) check(address string) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil || !o.holds(a) {
		return nil //nolint:nilerr // a name; its addresses are checked when they are dialled
	}
	return fmt.Errorf("%s: %w", address, errOwnAddress)
}

// control is for [net.Dialer]: it refuses what leads back here once names are
// addresses, before anything is sent.
func (o *own) control(network, address string, c syscall.RawConn) error {
	if err := o.check(address); err != nil {
		return err
	}
	return sockopt.StreamControl(network, address, c)
}
