package capture

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"culvert/internal/free"
)

// batchSize is how many datagrams are read or sent at once where as many wait.
const batchSize = 16

// mmsghdr is struct mmsghdr of recvmmsg(2) and sendmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	length uint32
}

// A batch is room for datagrams that are read together.
type batch struct {
	headers  [batchSize]mmsghdr
	iovecs   [batchSize]unix.Iovec
	names    [batchSize][unix.SizeofSockaddrInet6]byte // large enough for IPv4's
	controls [batchSize][controlSize]byte
	buffers  [batchSize][]byte
	control  bool // there is room for control messages
	used     int  // headers that the kernel has written to
}

// init makes room in a batch that has none, with room for control messages if the
// sockets tell which addresses datagrams were for.
func (b *batch) init(control bool) {
	memory := make([]byte, batchSize*maxDatagram) // what no datagram needs is never touched
	b.control, b.used = control, batchSize
	for i := range b.headers {
		b.buffers[i] = memory[i*maxDatagram : (i+1)*maxDatagram]
		b.iovecs[i].Base = &b.buffers[i][0]
		b.iovecs[i].SetLen(maxDatagram)
		h := &b.headers[i]
		h.Iov = &b.iovecs[i]
		h.SetIovlen(1)
		h.Name = &b.names[i][0]
		if control {
			h.Control = &b.controls[i][0]
		}
	}
}

// receive reads what waits at a socket and returns how many datagrams that was, 0 if
// none does. Fewer than batchSize were all.
func (b *batch) receive(fd uintptr) (int, error) {
	for i := range b.headers[:b.used] {
		h := &b.headers[i]
		h.Namelen = unix.SizeofSockaddrInet6
		if b.control {
			h.SetControllen(controlSize)
		}
	}
	b.used = 0
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.headers[0])), //nolint:gosec // as rule 4 of package unsafe has it
			batchSize, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.used = int(n)
			return b.used, nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return 0, nil
		}
		b.used = 1 // as far as is known
		return 0, os.NewSyscallError("recvmmsg", errno)
	}
}

// batches are shared by inlets: one has a batch while there is something in it.
type batches struct{ list free.List[batch] }

func (p *batches) get() *batch {
	b := p.list.Get()
	if b.buffers[0] == nil {
		b.init(true)
	}
	return b
}

// An inlet reads datagrams with recvmmsg(2), several with one call to the kernel
// when they come faster than they are read, each with the address that it was for. It
// allocates nothing in the long run, and is for one goroutine.
//
// Its calls and an outlet's do not wait, and Go's scheduler is not told of them: that
// would wake its monitor thread, which sleeps while nothing goes on, and cost more
// than a packet now and then does.
type inlet struct {
	conn    syscall.RawConn
	batches *batches
	read    func(fd uintptr) bool // tryRead, bound once

	*batch // of the last datagrams, nil while it waits
	n      int
	err    error
}

func newInlet(c *net.UDPConn, p *batches) (*inlet, error) {
	conn, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	in := &inlet{conn: conn, batches: p}
	in.read = in.tryRead
	return in, nil
}

// next waits for datagrams and returns how many there are. Those before are
// overwritten.
func (in *inlet) next() (int, error) {
	if err := in.conn.Read(in.read); err != nil {
		return 0, err
	}
	return in.n, in.err
}

func (in *inlet) tryRead(fd uintptr) bool {
	if in.batch == nil {
		in.batch = in.batches.get()
	}
	in.n, in.err = in.receive(fd)
	if in.n == 0 && in.err == nil {
		in.batches.list.Put(in.batch)
		in.batch = nil
		return false
	}
	return true
}

// at returns a datagram, where it came from and which address it was for, the
// zero Addr if that is not told.
func (b *batch) at(i int) (payload []byte, from netip.AddrPort, to netip.Addr) {
	h := &b.headers[i]
	name := b.names[i][:] // struct sockaddr_in of ip(7), or sockaddr_in6 of ipv6(7)
	port := binary.BigEndian.Uint16(name[2:])
	switch binary.NativeEndian.Uint16(name) {
	case unix.AF_INET:
		from = netip.AddrPortFrom(netip.AddrFrom4([4]byte(name[4:])), port)
	case unix.AF_INET6:
		from = netip.AddrPortFrom(netip.AddrFrom16([16]byte(name[8:])), port)
	}
	return b.buffers[i][:h.length], from, destination(b.controls[i][:h.Controllen])
}

// An outlet sends datagrams with sendmmsg(2), several with one call to the kernel.
// It is for one goroutine.
type outlet struct {
	headers [batchSize]mmsghdr
	iovecs  [batchSize]unix.Iovec
}

// outlets are shared by sockets.
type outlets struct{ list free.List[outlet] }

func (p *outlets) put(o *outlet, used int) {
	clear(o.iovecs[:used]) // what they refer to is others'
	clear(o.headers[:used])
	p.list.Put(o)
}

// load takes as many datagrams as there is room for, to an address and, unless
// control is nil, from the one that it names. It returns how many.
func (o *outlet) load(payloads [][]byte, to, control []byte) int {
	n := min(len(payloads), batchSize)
	for i, p := range payloads[:n] {
		o.iovecs[i] = unix.Iovec{Base: unsafe.SliceData(p)} //nolint:gosec // its length follows
		o.iovecs[i].SetLen(len(p))
		h := &o.headers[i]
		h.Iov = &o.iovecs[i]
		h.SetIovlen(1)
		h.Name, h.Namelen = &to[0], uint32(len(to)) //nolint:gosec // a few bytes
		if control != nil {
			h.Control = &control[0]
			h.SetControllen(len(control))
		}
	}
	return n
}

// send sends the first n that are loaded, as far as the first that is refused, and
// returns how many were sent. It does not wait.
func (o *outlet) send(fd uintptr, n int) (sent int, err error) {
	for sent < n {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&o.headers[sent])), //nolint:gosec // as rule 4 of package unsafe has it
			uintptr(n-sent), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			sent += int(n)
		case unix.EINTR:
		default:
			return sent, os.NewSyscallError("sendmmsg", errno)
		}
	}
	return sent, nil
}
