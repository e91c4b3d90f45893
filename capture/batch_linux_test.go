package capture

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"culvert/catalog"
)

// What waits is read several at a time, each with where it came from and what it
// was for, and without a new object each time.
func TestBatch(t *testing.T) {
	for _, at := range []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("[::]:0")} {
		t.Run(family(at.Addr()), func(t *testing.T) {
			c, b, err := listenPacketAny(at, new(batches))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			loopback := netip.MustParseAddr("127.0.0.1")
			if at.Addr().Is6() {
				loopback = netip.IPv6Loopback()
			}
			to := netip.AddrPortFrom(loopback, c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
			out, err := net.DialUDP("udp"+family(loopback), nil, net.UDPAddrFromAddrPort(to))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = out.Close() }()
			const sent = 2*batchSize + 3
			for i := range sent {
				if _, err := out.Write(bytes.Repeat([]byte{byte(i)}, 1+i*500)); err != nil {
					t.Fatal(err)
				}
			}
			var sizes []int
			for i := 0; i < sent; {
				n, err := b.next()
				if err != nil {
					t.Fatal(err)
				}
				sizes = append(sizes, n)
				for k := range n {
					payload, from, dst := b.at(k)
					if !bytes.Equal(payload, bytes.Repeat([]byte{byte(i)}, 1+i*500)) || from != out.LocalAddr().(*net.UDPAddr).AddrPort() || dst != loopback {
						t.Fatalf("datagram %d: %d bytes from %v for %v", i, len(payload), from, dst)
					}
					i++
				}
			}
			if fmt.Sprint(sizes) != "[16 16 3]" {
				t.Errorf("read %v at a time, want 16 where as many wait", sizes)
			}
			one := []byte("x")
			allocs := testing.AllocsPerRun(100, func() {
				_, _ = out.Write(one)
				n, err := b.next()
				if err != nil || n != 1 {
					t.Errorf("%d, %v", n, err)
				}
				b.at(0)
			})
			if allocs != 0 {
				t.Errorf("%v allocations a datagram", allocs)
			}
		})
	}
}

// deliver hands one packet to the server.
func deliver(c interface {
	Deliver(from catalog.Key, service string, packets [][]byte) (int, error)
}, from catalog.Key, service string, payload []byte,
) error {
	packets := [1][]byte{payload}
	n, err := c.Deliver(from, service, packets[:])
	if (n == 1) != (err == nil) {
		return fmt.Errorf("%d packets delivered, and %w", n, err)
	}
	return err
}
