package locator

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What only real sockets show: that a refusal and silence are told apart, that
// an attempt ends when it is called off, and that Control is called.

func listen(t *testing.T) (ln net.Listener, address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln, ln.Addr().String()
}

// nobody returns an address that refuses.
func nobody(t *testing.T) string {
	t.Helper()
	ln, address := listen(t)
	_ = ln.Close()
	return address
}

// blackhole returns an address that leaves SYNs unanswered: a listener whose
// queue is full. Calling drain empties it.
func blackhole(t *testing.T) (address string, drain func()) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := errors.Join(
		syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		syscall.Listen(fd, 0),
	); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	bound, ok := sa.(*syscall.SockaddrInet4)
	if !ok {
		t.Fatalf("bound to %v", sa)
	}
	address = (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: bound.Port}).String()
	for range 20 {
		c, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			return address, func() {
				for {
					c, _, err := syscall.Accept(fd)
					if err != nil {
						return // the queue is empty
					}
					_ = syscall.Close(c)
				}
			}
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Fatal("the queue of a listener with a backlog of 0 does not fill")
	return "", nil
}

func realPool(t *testing.T, endpoints ...string) *Pool {
	t.Helper()
	p := NewPool(PoolOptions{})
	t.Cleanup(p.own.Close)
	p.Set(Configured(endpoints...))
	return p
}

func TestRefusedBySockets(t *testing.T) {
	p := realPool(t, nobody(t), nobody(t))
	began := time.Now()
	if _, _, err := p.Dial(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Dial: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestBlackholeBesideAListener(t *testing.T) {
	hole, _ := blackhole(t)
	_, address := listen(t)
	p := realPool(t, hole, address, nobody(t))
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		c, endpoint, err := p.Dial(ctx)
		cancel()
		if err != nil || endpoint != address {
			t.Fatalf("came out at %q: %v", endpoint, err)
		}
		_ = c.Close()
	}
}

// The only endpoint is silent, and then answers.
func TestBlackholeThatOpens(t *testing.T) {
	hole, drain := blackhole(t)
	p := realPool(t, hole)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	attempts := make(chan struct{}, 100)
	dial := p.o.Dial
	p.o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		attempts <- struct{}{}
		return dial(ctx, network, address)
	}
	go func() {
		<-attempts // the first one is in vain
		for {
			select {
			case <-attempts:
				drain() // of what an attempt has left behind that came too late, too
			case <-ctx.Done():
				return
			}
		}
	}()
	c, _, err := p.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	wantHealth(t, p, hole+" up")
}

func TestCalledOffAtOnce(t *testing.T) {
	hole, _ := blackhole(t)
	p := realPool(t, hole)
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, _, err := p.Dial(ctx); err == nil {
		t.Error("connected to nobody")
	}
	if took := time.Since(began); took > 900*time.Millisecond {
		t.Errorf("took %v", took)
	}
}

func TestControlIsCalled(t *testing.T) {
	_, address := listen(t)
	var called atomic.Int32
	refused := errors.New("not this one")
	p := NewPool(PoolOptions{Control: func(_, to string, _ syscall.RawConn) error {
		called.Add(1)
		if to != address {
			return refused
		}
		return nil
	}})
	p.Set(Configured(address))
	c, _, err := p.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	p.Set(Configured(nobody(t)))
	if _, _, err := p.Dial(t.Context()); !errors.Is(err, refused) {
		t.Errorf("Dial: %v", err)
	}
	if called.Load() != 2 {
		t.Errorf("called %d times", called.Load())
	}
}
