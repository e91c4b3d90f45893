package lab

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// maxFlows bounds what a Tap remembers.
	maxFlows = 10000
	// tapBuffer is what the kernel keeps for a Tap that is busy, in bytes.
	tapBuffer = 8 << 20
)

// A Tap listens on the WAN link and keeps the first byte of each TCP connection
// each way.
type Tap struct {
	mu     sync.Mutex
	latest map[Flow]uint32 // by flow without Start: its current Start
	first  map[Flow]byte
	late   map[Flow]bool // flows with data, whose first byte was not seen
	beyond int           // segments that were not noted, for maxFlows
}

// A Flow is one direction of a TCP connection.
type Flow struct {
	From, To netip.AddrPort
	Start    uint32 // its initial sequence number: ports are used again
}

// Tap starts listening, until the test ends.
func (n *Network) Tap() *Tap {
	n.t.Helper()
	tap := newTap()
	host := n.Sites[0].Gateway
	fd, err := in(host, func() (int, error) {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return 0, err
		}
		if err := openTap(fd); err != nil {
			_ = unix.Close(fd)
			return 0, err
		}
		return fd, nil
	})
	if err != nil {
		n.t.Fatalf("tap the WAN link: %v", err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tap.listen(fd, stop)
	}()
	n.t.Cleanup(func() {
		close(stop)
		<-done
		_ = unix.Close(fd)
	})
	return tap
}

func newTap() *Tap {
	return &Tap{latest: make(map[Flow]uint32), first: make(map[Flow]byte), late: make(map[Flow]bool)}
}

func openTap(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapBuffer); err != nil {
		return err
	}
	index, err := interfaceIndex(fd, "wan0")
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}); err != nil {
		return err
	}
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000})
}

func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

func interfaceIndex(fd int, name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

func (t *Tap) listen(fd int, stop <-chan struct{}) {
	buf := make([]byte, 64<<10)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil {
			t.see(buf[:n])
		}
	}
}

// see looks at one IP packet.
func (t *Tap) see(p []byte) {
	var from, to netip.Addr
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		if p[9] != unix.IPPROTO_TCP {
			return
		}
		from, _ = netip.AddrFromSlice(p[12:16])
		to, _ = netip.AddrFromSlice(p[16:20])
		size := min(int(binary.BigEndian.Uint16(p[2:])), len(p)) // without padding
		head := int(p[0]&15) * 4
		if head > size {
			return
		}
		p = p[head:size]
	case len(p) >= 40 && p[0]>>4 == 6:
		if p[6] != unix.IPPROTO_TCP {
			return
		}
		from, _ = netip.AddrFromSlice(p[8:24])
		to, _ = netip.AddrFromSlice(p[24:40])
		p = p[40:min(40+int(binary.BigEndian.Uint16(p[4:])), len(p))]
	default:
		return
	}
	if len(p) < 20 {
		return
	}
	flow := Flow{
		From: netip.AddrPortFrom(from, binary.BigEndian.Uint16(p)),
		To:   netip.AddrPortFrom(to, binary.BigEndian.Uint16(p[2:])),
	}
	seq, head, syn := binary.BigEndian.Uint32(p[4:]), int(p[12]>>4)*4, p[13]&2 != 0
	var data []byte
	if head < len(p) {
		data = p[head:]
	}
	t.note(flow, seq, syn, data)
}

// note takes in one segment.
func (t *Tap) note(flow Flow, seq uint32, syn bool, data []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	start, known := t.latest[flow]
	if syn {
		if !known && len(t.latest) >= maxFlows {
			t.beyond++
			return
		}
		t.latest[flow] = seq
		start, known = seq, true
		seq++ // the SYN counts as one byte (RFC 9293 section 3.4)
	}
	if len(data) == 0 {
		return
	}
	flow.Start = start // 0 of one that began before the tap
	if _, seen := t.first[flow]; seen {
		return
	}
	switch {
	case !t.late[flow] && len(t.first)+len(t.late) >= maxFlows:
		t.beyond++
	case !known || seq != start+1:
		t.late[flow] = true
	default:
		t.first[flow] = data[0]
		delete(t.late, flow)
	}
}

// FirstBytes returns the first byte of each flow so far that has carried any.
func (t *Tap) FirstBytes() map[Flow]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.first)
}

// Missed counts flows with data whose beginning the tap has not seen, and
// segments beyond what it remembers: of these it cannot tell the first byte.
func (t *Tap) Missed() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.late) + t.beyond
}

// Check fails the test unless connections were seen and each began with the
// byte, each way.
func (t *Tap) Check(tb testing.TB, want ...byte) {
	tb.Helper()
	there, back := 0, 0
	for flow, got := range t.FirstBytes() {
		if !slices.Contains(want, got) {
			tb.Errorf("the first byte from %v to %v is %#x, want %#x", flow.From, flow.To, got, want)
		}
		if flow.To.Port() == 8443 {
			there++
		} else {
			back++
		}
	}
	if there == 0 || back == 0 {
		tb.Errorf("%d connections with data seen one way and %d the other: the tap is broken", there, back)
	}
	if missed := t.Missed(); missed > 0 {
		tb.Errorf("the tap has missed the beginning of %d flows with data", missed)
	}
}
