package capture

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"culvert/capture/ruleset"
	"culvert/catalog"
	"culvert/internal/iproute"
)

// A PeerError tells which peer cannot be captured by redirect, and what would
// help.
type PeerError struct {
	Peer    catalog.Key
	Address netip.Addr // its advertised one
	Problem string
	Remedy  string
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("capture peer %s at %s: %s", e.Peer, e.Address, e.Problem)
}

// Hint returns the remedy.
func (e *PeerError) Hint() string { return e.Remedy }

// plan is what the kernel should hold for peers where it holds old.
//
// Who had an endpoint keeps it. An address that was captured, or refused, and is
// nobody's now is refused; one that a sibling has now is not.
func (r *Redirect) plan(peers []catalog.Peer, old ruleset.State) (ruleset.State, error) {
	next := ruleset.State{Peers: make(map[netip.Addr]ruleset.Peer), Lost: make(map[netip.Addr]string)}
	plain := map[netip.Addr]bool{r.o.Server: true}
	var captured []catalog.Peer
	for _, p := range peers {
		if p.Datacenter == r.o.Self.Datacenter {
			plain[p.Advertise] = true
			continue
		}
		captured = append(captured, p)
	}
	faults := r.checkPeers(captured)
	owners := make(map[netip.Addr]catalog.Key)
	for _, p := range captured {
		if other, taken := owners[p.Advertise]; taken {
			faults = append(faults, &PeerError{p.Key, p.Advertise, fmt.Sprintf("peer %s has the same address", other), "each server needs an address of its own"})
		}
		owners[p.Advertise] = p.Key
	}
	if err := errors.Join(faults...); err != nil {
		return next, err
	}
	endpoints := assign(captured, old, r.o.Server.Is6())
	for _, p := range captured {
		next.Peers[p.Advertise] = ruleset.Peer{Endpoint: endpoints[p.Key], Name: ruleset.Label(p.String())}
	}
	if r.o.Open {
		return next, nil
	}
	lose := func(at netip.Addr, name string) {
		// What a sidecar of the other family has left is not this one's to keep.
		if _, taken := owners[at]; !taken && !plain[at] && at.Is4() == r.o.Server.Is4() {
			next.Lost[at] = name
		}
	}
	for at, name := range old.Lost {
		lose(at, name)
	}
	for at, p := range old.Peers {
		lose(at, p.Name)
	}
	return next, nil
}

// checkPeers tells which peers cannot be captured at their addresses. Those that
// are captured there have been checked.
func (r *Redirect) checkPeers(peers []catalog.Peer) (faults []error) {
	routes, err := iproute.Ask()
	if err != nil {
		return []error{err}
	}
	defer routes.Close()
	for _, p := range peers {
		if _, known := r.state.Peers[p.Advertise]; known {
			continue
		}
		if err := r.checkPeer(routes, p); err != nil {
			faults = append(faults, err)
		}
	}
	return faults
}

// checkPeer tells why a peer cannot be captured at its address.
func (r *Redirect) checkPeer(routes *iproute.Asker, p catalog.Peer) error {
	fault := func(problem, remedy string) error { return &PeerError{p.Key, p.Advertise, problem, remedy} }
	a := p.Advertise
	switch {
	case !a.IsValid(), a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
		return fault("no server of another datacenter can have this address",
			`advertise is the peer's real address with capture = "redirect"; for a virtual one use capture = "bind"`)
	case a.Is4() != r.o.Server.Is4():
		return fault(fmt.Sprintf("this server has %s: IPv4 and IPv6", r.o.Server), "servers that gossip with each other use one family")
	case routes.Local(a) == nil:
		return fault("the address is this host's own",
			`two datacenters that use the same addresses cannot be told apart by them: use capture = "bind" with virtual addresses`)
	}
	if err := routes.Reachable(a); err != nil {
		return fault(fmt.Sprintf("this host has no route to it (%v), so the server's packets would be refused before they are captured", err),
			"add one, whether it leads there or not: `ip route add "+netip.PrefixFrom(a, a.BitLen()).String()+" dev <interface>`; a default route does")
	}
	return nil
}

// assign gives each peer an endpoint of its own: the one it has, or one that is
// derived from its name, so that it is the same after a restart and on every
// host. Where two names lead to one address the later one in their order moves.
func assign(peers []catalog.Peer, old ruleset.State, v6 bool) map[catalog.Key]netip.Addr {
	has := make(map[string]netip.Addr, len(old.Peers))
	for _, p := range old.Peers {
		if (ruleset.Spec{V6: v6}).Range().Contains(p.Endpoint) {
			has[p.Name] = p.Endpoint
		}
	}
	keys := make([]catalog.Key, 0, len(peers))
	for _, p := range peers {
		keys = append(keys, p.Key)
	}
	slices.SortFunc(keys, func(a, b catalog.Key) int { return strings.Compare(a.String(), b.String()) })
	endpoints := make(map[catalog.Key]netip.Addr, len(peers))
	taken := make(map[netip.Addr]bool, len(peers))
	for _, key := range keys {
		if at, ok := has[ruleset.Label(key.String())]; ok && !taken[at] {
			endpoints[key], taken[at] = at, true
		}
	}
	for _, key := range keys {
		for try := uint32(0); !endpoints[key].IsValid(); try++ {
			if at := derived(key, v6, try); !taken[at] {
				endpoints[key], taken[at] = at, true
			}
		}
	}
	return endpoints
}

// derived is the try-th address for a peer in the range of endpoints, of which
// the lowest and the highest stay free.
func derived(key catalog.Key, v6 bool, try uint32) netip.Addr {
	sum := sha256.Sum256(binary.BigEndian.AppendUint32([]byte(key.String()), try))
	if v6 {
		at := ruleset.Range6.Addr().As16()
		copy(at[8:], sum[:8])
		return netip.AddrFrom16(at)
	}
	at := ruleset.Range4.Addr().As4()
	const hosts = 1<<16 - 2
	host := binary.BigEndian.Uint32(sum[:])%hosts + 1
	at[2], at[3] = byte(host>>8), byte(host) //nolint:gosec // two bytes of it
	return netip.AddrFrom4(at)
}
