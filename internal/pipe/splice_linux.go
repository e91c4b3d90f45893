package pipe

import (
	"errors"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is asked for each kernel pipe. Ordinary users have a limit on
	// all their pipes together (pipe(7), pipe-user-pages-soft): past it the
	// default of 64 KiB serves.
	pipeSize = 1 << 20
	// maxIdlePipes bounds the pipes that are kept for later, two descriptors
	// each.
	maxIdlePipes = 32

	spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
)

// A kernelPipe carries bytes between two sockets without a copy.
type kernelPipe struct {
	r, w int
	size int
}

// idlePipes are empty pipes. One that holds bytes never gets here: another
// connection would deliver them.
type idlePipes struct {
	mu   sync.Mutex
	free []*kernelPipe
}

//nolint:gochecknoglobals // kernel pipes count against the process, whoever uses them
var pipes idlePipes

// get returns an empty pipe, nil if the process can have no more.
func (p *idlePipes) get() *kernelPipe {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		k := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return k
	}
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	k := &kernelPipe{r: fds[0], w: fds[1], size: 64 << 10}
	if size, err := unix.FcntlInt(uintptr(k.w), unix.F_SETPIPE_SZ, pipeSize); err == nil {
		k.size = size
	}
	return k
}

func (p *idlePipes) put(k *kernelPipe) {
	p.mu.Lock()
	keep := len(p.free) < maxIdlePipes
	if keep {
		p.free = append(p.free, k)
	}
	p.mu.Unlock()
	if !keep {
		k.close()
	}
}

func (k *kernelPipe) close() {
	_ = unix.Close(k.r)
	_ = unix.Close(k.w)
}

// A mover moves bytes from a TCP connection. It holds a pipe or a buffer only
// from the moment there is something to read until there is nothing more.
type mover struct {
	src   syscall.RawConn
	dst   net.Conn
	raw   syscall.RawConn // of dst, if that is TCP too
	count counter
	total int64

	pipe *kernelPipe
	buf  *[bufferSize]byte
	n    int   // bytes that were read last
	err  error // of the last read or write
}

func moveFromTCP(dst net.Conn, src *net.TCPConn, count counter) (n int64, read, write error) {
	m := &mover{dst: dst, count: count}
	if m.src, read = src.SyscallConn(); read != nil {
		return 0, read, nil
	}
	if to, ok := dst.(*net.TCPConn); ok {
		if m.raw, write = to.SyscallConn(); write != nil {
			return 0, nil, write
		}
	}
	for {
		if err := m.fill(); err != nil || m.n == 0 {
			m.release()
			return m.total, err, nil
		}
		if err := m.drain(); err != nil {
			return m.total, nil, err
		}
	}
}

// fill waits for bytes and takes them into the pipe or the buffer. No bytes and
// no error is the end.
func (m *mover) fill() error {
	if err := m.src.Read(m.tryFill); err != nil {
		return err
	}
	return m.err
}

// tryFill reports whether to stop waiting. The poller tells of changes only,
// so it must have seen EAGAIN before it waits.
func (m *mover) tryFill(fd uintptr) bool {
	m.acquire()
	for {
		if m.pipe != nil {
			n, err := unix.Splice(int(fd), nil, m.pipe.w, nil, m.pipe.size, spliceFlags)
			m.n, m.err = int(n), err
		} else {
			m.n, m.err = unix.Read(int(fd), m.buf[:])
		}
		switch {
		case m.err == nil:
		case errors.Is(m.err, unix.EINTR):
			continue
		case errors.Is(m.err, unix.EAGAIN):
			m.release()
			return false
		default:
			m.n = 0
		}
		return true
	}
}

func (m *mover) acquire() {
	if m.pipe != nil || m.buf != nil {
		return
	}
	if m.raw != nil {
		if m.pipe = pipes.get(); m.pipe != nil {
			return
		}
	}
	m.buf = buffers.Get().(*[bufferSize]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
}

// release gives back what is held, which is empty.
func (m *mover) release() {
	if m.pipe != nil {
		pipes.put(m.pipe)
		m.pipe = nil
	}
	if m.buf != nil {
		buffers.Put(m.buf)
		m.buf = nil
	}
}

// drain hands on what fill took. After an error the pipe may hold bytes, and is
// closed.
func (m *mover) drain() error {
	if m.pipe == nil {
		n, err := m.dst.Write(m.buf[:m.n])
		m.add(n)
		if err != nil {
			m.release()
		}
		return err
	}
	for m.n > 0 {
		err := m.raw.Write(m.tryDrain)
		if err == nil {
			err = m.err
		}
		if err != nil {
			m.pipe.close()
			m.pipe = nil
			return err
		}
	}
	return nil
}

func (m *mover) tryDrain(fd uintptr) bool {
	for {
		n, err := unix.Splice(m.pipe.r, nil, int(fd), nil, m.n, spliceFlags)
		m.err = err
		switch {
		case err == nil:
			m.n -= int(n)
			m.add(int(n))
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false
		}
		return true
	}
}

func (m *mover) add(n int) {
	m.total += int64(n)
	m.count.add(n)
}
