package lab

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"testing"
)

const (
	ack = 0x10
	syn = 0x02
)

var (
	client = netip.MustParseAddrPort("10.79.0.1:40000")
	server = netip.MustParseAddrPort("10.79.0.2:8443")
)

// segment is an IP packet with a TCP segment that has twelve bytes of options,
// followed by what Ethernet adds to short frames.
func segment(from, to netip.AddrPort, seq uint32, flags byte, data string) []byte {
	tcp := make([]byte, 32)
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], seq)
	tcp[12], tcp[13] = 8<<4, flags
	tcp = append(tcp, data...)
	var p []byte
	if from.Addr().Is4() {
		p = make([]byte, 12, 20)
		p[0], p[9] = 0x45, 6
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(tcp)))
	} else {
		p = make([]byte, 8, 40)
		p[0], p[6] = 0x60, 6
		binary.BigEndian.PutUint16(p[4:], uint16(len(tcp)))
	}
	p = append(p, from.Addr().AsSlice()...)
	p = append(p, to.Addr().AsSlice()...)
	return append(append(p, tcp...), "padding"...)
}

func check(t *testing.T, tap *Tap, missed int, want map[Flow]byte) {
	t.Helper()
	if got := tap.FirstBytes(); !maps.Equal(got, want) {
		t.Errorf("first bytes %v, want %v", got, want)
	}
	if got := tap.Missed(); got != missed {
		t.Errorf("%d flows missed, want %d", got, missed)
	}
}

func TestTapFirstBytes(t *testing.T) {
	client6, server6 := netip.MustParseAddrPort("[fd79::1]:40000"), netip.MustParseAddrPort("[fd79::2]:8443")
	for _, ends := range [][2]netip.AddrPort{{client, server}, {client6, server6}} {
		c, s := ends[0], ends[1]
		tap := newTap()
		tap.see(segment(c, s, 0xffffffff, syn, "")) // the sequence wraps
		tap.see(segment(s, c, 700, syn|ack, ""))
		tap.see(segment(c, s, 0, ack, "")) // padding is no data
		check(t, tap, 0, map[Flow]byte{})
		tap.see(segment(c, s, 3, ack, "later"))
		check(t, tap, 1, map[Flow]byte{})
		tap.see(segment(c, s, 0, ack, "\x16ab"))
		tap.see(segment(c, s, 0, ack, "x sent again"))
		tap.see(segment(s, c, 701, ack, "H"))
		want := map[Flow]byte{{c, s, 0xffffffff}: 0x16, {s, c, 700}: 'H'}
		check(t, tap, 0, want)

		// The ports are used again: both connections are kept.
		tap.see(segment(c, s, 5000, syn, ""))
		tap.see(segment(c, s, 5001, ack, "G"))
		want[Flow{c, s, 5000}] = 'G'
		check(t, tap, 0, want)
	}
}

func TestTapMissesWhatBeganBefore(t *testing.T) {
	tap := newTap()
	tap.see(segment(client, server, 1, ack, "a"))
	tap.see(segment(client, server, 2, ack, "b"))
	check(t, tap, 1, map[Flow]byte{})
	tap.see(segment(client, server, 9, syn, "data in the SYN"))
	check(t, tap, 1, map[Flow]byte{{client, server, 9}: 'd'})
}

// What is no TCP, or cut anywhere, is nothing to the tap, and not its end.
func TestTapCutPackets(t *testing.T) {
	whole := segment(client, server, 5, syn, "x")
	for n := range whole {
		tap := newTap()
		tap.see(whole[:n])
		if n <= 20+32 {
			check(t, tap, 0, map[Flow]byte{})
		}
	}
	whole[9] = 17 // UDP
	tap := newTap()
	tap.see(whole)
	check(t, tap, 0, map[Flow]byte{})
}

func TestTapIsBounded(t *testing.T) {
	tap := newTap()
	for i := range 2*maxFlows + 1 {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1)
		tap.see(segment(from, server, 1, syn, ""))
		tap.see(segment(from, server, 2, ack, "x"))
		tap.see(segment(server, from, 2, ack, "x")) // began before
	}
	if n := len(tap.latest) + len(tap.first) + len(tap.late); n > 2*maxFlows {
		t.Errorf("the tap keeps %d entries, want at most %d", n, 2*maxFlows)
	}
	if tap.beyond == 0 {
		t.Error("the tap has forgotten flows and does not tell")
	}
}

// Check finds what it is there to find.
func TestTapCheck(t *testing.T) {
	both := func(there, back string) *Tap {
		tap := newTap()
		tap.see(segment(client, server, 1, syn, ""))
		tap.see(segment(server, client, 1, syn|ack, ""))
		tap.see(segment(client, server, 2, ack, there))
		tap.see(segment(server, client, 2, ack, back))
		return tap
	}
	for _, c := range []struct {
		name   string
		tap    *Tap
		errors int
	}{
		{"nothing", newTap(), 1},
		{"both ways", both("\x16", "\x16"), 0},
		{"a wrong byte there", both("G", "\x16"), 1},
		{"a wrong byte back", both("\x16", "H"), 1},
		{"nothing back", both("\x16", ""), 1},
	} {
		rec := &recorder{TB: t}
		c.tap.Check(rec, 0x16)
		if len(rec.errors) != c.errors {
			t.Errorf("%s: %q, want %d errors", c.name, rec.errors, c.errors)
		}
	}
}

// A recorder keeps the errors of a check.
type recorder struct {
	testing.TB
	errors []string
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}
