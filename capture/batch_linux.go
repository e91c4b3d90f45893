package capture

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// batchSize is how many datagrams are read at once where as many wait.
const batchSize = 16

// A batch reads datagrams with recvmmsg(2), several with one call to the kernel
// when they come faster than they are read: the one socket for a service of all
// peers has many writers. It allocates nothing once it is made, and is for one
// goroutine.
type batch struct {
	conn syscall.RawConn
	read func(fd uintptr) bool // tryRead, bound once

	headers  [batchSize]mmsghdr
	iovecs   [batchSize]unix.Iovec
	names    [batchSize][unix.SizeofSockaddrInet6]byte // large enough for IPv4's
	controls [batchSize][controlSize]byte
	buffers  [batchSize][]byte

	n   int
	err error
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	length uint32
}

func newBatch(c *net.UDPConn) (*batch, error) {
	conn, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	b := &batch{conn: conn}
	b.read = b.tryRead
	memory := make([]byte, batchSize*maxDatagram) // what no datagram needs is never touched
	for i := range b.headers {
		b.buffers[i] = memory[i*maxDatagram : (i+1)*maxDatagram]
		b.iovecs[i].Base = &b.buffers[i][0]
		b.iovecs[i].SetLen(maxDatagram)
		h := &b.headers[i]
		h.Iov = &b.iovecs[i]
		h.SetIovlen(1)
		h.Name = &b.names[i][0]
		h.Control = &b.controls[i][0]
	}
	return b, nil
}

// next waits for datagrams and returns how many there are. Those before are
// overwritten.
func (b *batch) next() (int, error) {
	if err := b.conn.Read(b.read); err != nil {
		return 0, err
	}
	return b.n, b.err
}

func (b *batch) tryRead(fd uintptr) bool {
	for i := range b.headers {
		h := &b.headers[i]
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSize)
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.headers[0])), //nolint:gosec // as rule 4 of package unsafe has it
			batchSize, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.n, b.err = int(n), nil
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		b.n, b.err = 0, os.NewSyscallError("recvmmsg", errno)
		return true
	}
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
