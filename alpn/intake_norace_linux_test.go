//go:build !race

package alpn

import "testing"

// crypto/tls has a sync.Pool, which loses a part of what it is given under the race
// detector. `make test` runs this once more without it.
func TestPacketConnAllocatesNothing(t *testing.T) {
	s := newSite(t)
	c, a := s.connectTCP(t, "gossip-packet")
	p, buf := make([]byte, 516), make([]byte, 1024)
	if n := testing.AllocsPerRun(1000, func() {
		_, _ = c.Write(p)
		if n, err := a.Read(buf); n != len(p) || err != nil {
			t.Fatal(n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a record", n)
	}
}
