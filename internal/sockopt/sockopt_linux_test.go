package sockopt

import (
	"context"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func dial(t *testing.T) *net.TCPConn {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func option(t *testing.T, c *net.TCPConn, level, name int) (value int, err error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) }); cerr != nil {
		t.Fatal(cerr)
	}
	return value, err
}

func want(t *testing.T, c *net.TCPConn, name string, level, opt, want int) {
	t.Helper()
	got, err := option(t, c, level, opt)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	if got != want {
		t.Errorf("%s = %d, want %d", name, got, want)
	}
}

// capped says whether this kernel has TCP_RTO_MAX_MS at all.
func capped(t *testing.T) bool {
	t.Helper()
	_, err := option(t, dial(t), unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS)
	return err == nil
}

func TestPacket(t *testing.T) {
	c := dial(t)
	if err := Packet(c); err != nil {
		t.Fatal(err)
	}
	want(t, c, "TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	want(t, c, "TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 5)
	wantPacket(t, c)
	other := dial(t)
	if err := apply(other, PacketSocket); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, other)
}

func wantPacket(t *testing.T, c *net.TCPConn) {
	t.Helper()
	want(t, c, "SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	want(t, c, "TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1)
	want(t, c, "TCP_NOTSENT_LOWAT", unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 16<<10)
	if capped(t) {
		want(t, c, "TCP_RTO_MAX_MS", unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, 1000)
		want(t, c, "TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 10_000)
		want(t, c, "TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 5)
	} else {
		want(t, c, "TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1)
		want(t, c, "TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 3_000)
	}
}

// Linux gives up at the first keepalive probe that is due after the user
// timeout: one lost probe must not be enough, with the cap or without.
func TestPacketOutlivesALostProbe(t *testing.T) {
	for name, limit := range map[string]func(int) (bool, error){
		"capped":   func(int) (bool, error) { return true, nil },
		"uncapped": func(int) (bool, error) { return false, nil },
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t)
			if err := packet(c, limit); err != nil {
				t.Fatal(err)
			}
			var ms [3]int
			for i, opt := range []int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_USER_TIMEOUT} {
				var err error
				if ms[i], err = option(t, c, unix.IPPROTO_TCP, opt); err != nil {
					t.Fatal(err)
				}
			}
			idle, interval, timeout := ms[0]*1000, ms[1]*1000, ms[2]
			if idle+2*interval > timeout {
				t.Errorf("idle %d ms, interval %d ms: fewer than two probes within the user timeout of %d ms", idle, interval, timeout)
			}
			if name == "uncapped" && timeout != int(PacketTimeoutUncapped.Milliseconds()) {
				t.Errorf("user timeout %d ms, want %v", timeout, PacketTimeoutUncapped)
			}
		})
	}
}

func TestStream(t *testing.T) {
	c := dial(t)
	if err := Stream(c); err != nil {
		t.Fatal(err)
	}
	want(t, c, "SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	want(t, c, "TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30)
	want(t, c, "TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 10)
	want(t, c, "TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3)
	want(t, c, "TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 60_000)
	if capped(t) {
		want(t, c, "TCP_RTO_MAX_MS", unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, 1000)
	}
}

// What is dialled and what is accepted have the options of a stream from the start.
func TestStreamControl(t *testing.T) {
	lc := net.ListenConfig{Control: StreamControl, KeepAlive: -1}
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d := net.Dialer{Control: StreamControl, KeepAlive: -1}
	dialled, err := d.DialContext(t.Context(), "tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for _, c := range []net.Conn{dialled, accepted} {
		c := c.(*net.TCPConn)
		want(t, c, "TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		want(t, c, "SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		want(t, c, "TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30)
		want(t, c, "TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 10)
		want(t, c, "TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 60_000)
		if capped(t) {
			want(t, c, "TCP_RTO_MAX_MS", unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, 1000)
		}
	}
}

// Who sends nothing is not accepted, and who does is, with the options of a stream.
func TestStreamListener(t *testing.T) {
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error { return control(c, StreamListener) }}
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	silent, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	speaks, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer speaks.Close()
	if _, err := speaks.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if accepted.RemoteAddr().String() != speaks.LocalAddr().String() {
		t.Errorf("accepted is %v, want %v", accepted.RemoteAddr(), speaks.LocalAddr())
	}
	want(t, accepted.(*net.TCPConn), "TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 60_000)
	_ = ln.(*net.TCPListener).SetDeadline(time.Now().Add(200 * time.Millisecond))
	if c, err := ln.Accept(); err == nil {
		t.Errorf("%v is accepted and has sent nothing", c.RemoteAddr())
		_ = c.Close()
	}
}

// A kernel without the option must not make every connection fail.
func TestPacketTimeoutWithoutCap(t *testing.T) {
	if got := packetTimeout(false); got != 3*time.Second {
		t.Errorf("packetTimeout(false) = %v, want 3s", got)
	}
	// A socket that is no TCP socket refuses the option as an old kernel does.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if ok, err := capRTO(fd); ok || err != nil {
		t.Errorf("capRTO on a UDP socket = %v, %v, want false, nil", ok, err)
	}
}

func TestClosed(t *testing.T) {
	c := dial(t)
	c.Close()
	if err := Packet(c); err == nil {
		t.Error("Packet on a closed connection gave no error")
	}
	if err := Stream(c); err == nil {
		t.Error("Stream on a closed connection gave no error")
	}
}
