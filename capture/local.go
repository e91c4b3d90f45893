package capture

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// localAddrs knows this host's own addresses. Interfaces come and go, so a
// miss looks again, at most once in a second.
type localAddrs struct {
	known []netip.Addr // the configured ones, local by whatever route

	mu    sync.Mutex
	ifs   map[netip.Addr]bool
	asked time.Time
}

func (l *localAddrs) contains(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	if slices.Contains(l.known, a) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ifs[a] {
		return true
	}
	if time.Since(l.asked) < time.Second {
		return false
	}
	l.asked = time.Now()
	l.ifs = interfaceAddrs()
	return l.ifs[a]
}

func interfaceAddrs() map[netip.Addr]bool {
	set := make(map[netip.Addr]bool)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return set // fail closed: nothing but loopback is local
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			set[p.Addr().Unmap()] = true
		}
	}
	return set
}

// sometimes lets one event in ten seconds through.
type sometimes struct {
	mu   sync.Mutex
	last time.Time
}

func (s *sometimes) allow(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.last) < 10*time.Second {
		return false
	}
	s.last = now
	return true
}
