package sidecar

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"culvert/capture"
	"culvert/catalog"
)

// A peer of the records that the host cannot capture costs nobody else; one of the
// configuration does.
func TestCaptureMost(t *testing.T) {
	var peers []catalog.Peer
	for i, node := range []string{"a", "b", "c", "d"} {
		key := catalog.Key{Datacenter: "dc2", Node: node}
		peers = append(peers, catalog.Peer{Key: key, Advertise: netip.AddrFrom4([4]byte{127, 77, 2, byte(i)})})
	}
	key := func(node string) catalog.Key { return catalog.Key{Datacenter: "dc2", Node: node} }
	// refuse makes a capture that cannot have some peers, and tells of two kinds.
	refuse := func(nodes ...string) (func([]catalog.Peer) error, *[]catalog.Peer) {
		var got []catalog.Peer
		return func(peers []catalog.Peer) error {
			var faults []error
			for i, p := range peers {
				switch {
				case !slices.Contains(nodes, p.Node):
				case i%2 == 0:
					faults = append(faults, &capture.PeerError{Peer: p.Key})
				default:
					faults = append(faults, fmt.Errorf("wrapped: %w", &capture.EndpointError{Peer: p.Key, Err: errors.New("in use")}))
				}
			}
			got = peers
			return errors.Join(faults...)
		}, &got
	}
	all := func(catalog.Key) bool { return true }

	captured, got := refuse()
	kept, out, err := captureMost(peers, captured, all)
	if err != nil || len(out) != 0 || !slices.Equal(kept, peers) || !slices.Equal(*got, peers) {
		t.Errorf("nothing refused: kept %v, out %v, %v", kept, out, err)
	}
	captured, got = refuse("a", "b")
	kept, out, err = captureMost(peers, captured, all)
	if err != nil || len(out) != 2 || out[key("a")] == nil || out[key("b")] == nil || !slices.Equal(kept, peers[2:]) || !slices.Equal(*got, kept) {
		t.Errorf("two refused: kept %v, out %v, captured %v, %v", kept, out, *got, err)
	}
	captured, _ = refuse("a", "d")
	if _, _, err = captureMost(peers, captured, func(k catalog.Key) bool { return k.Node != "d" }); err == nil {
		t.Error("a peer of the configuration was left out")
	}
	other := errors.New("closed")
	if _, _, err = captureMost(peers, func([]catalog.Peer) error { return other }, all); !errors.Is(err, other) {
		t.Errorf("an error about no peer: %v", err)
	}
	stubborn := func([]catalog.Peer) error { return &capture.PeerError{Peer: key("a")} }
	if _, _, err = captureMost(peers, stubborn, all); err == nil {
		t.Error("an error about a peer that was taken out already was passed over")
	}
}
