package iproute

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
)

func TestLocal(t *testing.T) {
	for addr, want := range map[string]error{
		"127.0.0.1":    nil,
		"127.200.3.4":  nil, // all of 127.0.0.0/8 is
		"192.0.2.1":    syscall.EADDRNOTAVAIL,
		"2001:db8::99": syscall.EADDRNOTAVAIL,
	} {
		if err := Local(netip.MustParseAddr(addr)); !errors.Is(err, want) {
			t.Errorf("Local(%s) = %v, want %v", addr, err, want)
		}
	}
}

func TestReachable(t *testing.T) {
	if err := Reachable(netip.MustParseAddr("127.0.0.1")); err != nil {
		t.Errorf("loopback: %v", err)
	}
	// 240.0.0.0/4 has no route anywhere but by a default route, which a host may
	// have: either answer is one, and a failure to ask is not.
	err := Reachable(netip.MustParseAddr("240.0.0.1"))
	if _, refused := errors.AsType[syscall.Errno](err); err != nil && !refused {
		t.Errorf("a question that could not be asked: %v", err)
	}
}
