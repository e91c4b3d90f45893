package wanfed

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/hashicorp/consul/agent/consul/wanfed"
)

// An end is one side of Consul's transport in a process of its own, so that what it
// costs can be told from what the test costs: this test binary, running [TestEnd]
// with endVariable set. It sends what it is told to, and counts or answers what comes.
//
// Beside that it has a bare UDP socket that does the same, for comparison.
const endVariable = "CULVERT_WANFED_END"

// An endConfig is what an end is given in its environment.
type endConfig struct {
	DC, Node         string
	CA, Cert, Key    string // files
	Gossip           string // address of the memberlist transport's own sockets
	RPC              string // where it takes TLS
	UDP              string // the bare socket's
	Other, OtherNode string // the other end's RPC address, and its name
	OtherUDP         string
}

// A request is what an end is asked for, a line of JSON, and answered by a line.
type request struct {
	Do    string // send, await, ping, reset
	By    string // wanfed or udp
	Count int
	Size  int
	Gap   time.Duration // between pings
}

type answer struct {
	Error string
	Took  time.Duration
	RTTs  []time.Duration
}

// TestEnd is no test of anything: see [endVariable].
func TestEnd(t *testing.T) {
	text := os.Getenv(endVariable)
	if text == "" {
		return
	}
	var c endConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	e := newEnd(t, c)
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			return // it is over
		}
		var a answer
		began := time.Now()
		if err := e.do(r, &a); err != nil {
			a.Error = err.Error()
		}
		a.Took = time.Since(began)
		if err := out.Encode(a); err != nil {
			t.Fatal(err)
		}
	}
}

type wanfedEnd struct {
	transport *wanfed.Transport
	to        memberlist.Address
	udp       *net.UDPConn
	toUDP     *net.UDPAddr
	ways      map[string]*way
}

// A way is how packets go.
type way struct {
	write func(p []byte) error
	came  atomic.Int64
	pong  chan struct{}
}

// udpWindow is how many packets by bare UDP are under way at most. The last is answered.
const udpWindow = 64

// The first byte of a packet tells what is to become of it.
const (
	counted = iota
	pinged
	ponged
)

func newEnd(t *testing.T, c endConfig) *wanfedEnd {
	cfg := configurator(t, cert{c.CA, c.Cert, c.Key})
	host, port, err := net.SplitHostPort(c.Gossip)
	if err != nil {
		t.Fatal(err)
	}
	var gossip int
	if _, err := fmt.Sscan(port, &gossip); err != nil {
		t.Fatal(err)
	}
	plain, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{host}, BindPort: gossip, Logger: log.New(io.Discard, "", 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	e := &wanfedEnd{to: memberlist.Address{Name: c.OtherNode, Addr: c.Other}}
	e.transport, err = wanfed.NewTransport(cfg, plain, c.DC, func(string) string { return c.Other })
	if err != nil {
		t.Fatal(err)
	}
	newServer(t, c.DC, c.RPC, cfg, func(s *server) { s.wan = e.transport })
	if e.udp, err = listenUDP(c.UDP); err != nil {
		t.Fatal(err)
	}
	if e.toUDP, err = net.ResolveUDPAddr("udp4", c.OtherUDP); err != nil {
		t.Fatal(err)
	}
	to := e.toUDP.AddrPort()
	e.ways = map[string]*way{
		"wanfed": {pong: make(chan struct{}, 1), write: func(p []byte) error {
			_, err := e.transport.WriteToAddress(p, e.to)
			return err
		}},
		"udp": {pong: make(chan struct{}, 1), write: func(p []byte) error {
			_, err := e.udp.WriteToUDPAddrPort(p, to)
			return err
		}},
	}
	go e.takePackets()
	go e.takeUDP()
	return e
}

func listenUDP(at string) (*net.UDPConn, error) {
	addr, err := net.ResolveUDPAddr("udp4", at)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP("udp4", addr)
	if err != nil {
		return nil, err
	}
	return c, errors.Join(c.SetReadBuffer(1<<20), c.SetWriteBuffer(1<<20))
}

// takePackets does what memberlist does first of all: it takes packets from the
// transport's channel.
func (e *wanfedEnd) takePackets() {
	for p := range e.transport.PacketCh() {
		e.ways["wanfed"].take(p.Buf)
	}
}

func (e *wanfedEnd) takeUDP() {
	buf := make([]byte, 1<<16)
	for {
		n, _, err := e.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		e.ways["udp"].take(buf[:n])
	}
}

func (w *way) take(p []byte) {
	switch p[0] {
	case counted:
		w.came.Add(1)
	case pinged:
		w.came.Add(1)
		p[0] = ponged
		_ = w.write(p) // lost like any packet
	case ponged:
		select {
		case w.pong <- struct{}{}:
		default:
		}
	}
}

func (e *wanfedEnd) do(r request, a *answer) (err error) {
	w := e.ways[r.By]
	p := make([]byte, max(r.Size, 1))
	switch r.Do {
	case "send":
		for i := range r.Count {
			p[0] = counted
			if r.By == "udp" && i%udpWindow == udpWindow-1 {
				p[0] = pinged // nothing else keeps the sender from flooding the receiver's buffer
			}
			if err := w.write(p); err != nil {
				return err
			}
			if p[0] == pinged {
				select {
				case <-w.pong:
				case <-time.After(time.Second):
				}
			}
		}
	case "await": // what has been sent since the last reset; by UDP some may be lost
		for limit := time.Now().Add(5 * time.Second); w.came.Load() < int64(r.Count) && time.Now().Before(limit); {
			time.Sleep(time.Millisecond)
		}
		r.Count = int(w.came.Load())
		a.RTTs = []time.Duration{time.Duration(r.Count)}
	case "ping":
		for range r.Count {
			p[0] = pinged
			began := time.Now()
			if err := w.write(p); err != nil {
				return err
			}
			select {
			case <-w.pong:
				a.RTTs = append(a.RTTs, time.Since(began))
			case <-time.After(time.Second):
			}
			time.Sleep(r.Gap)
		}
	case "reset":
		w.came.Store(0)
	default:
		err = fmt.Errorf("nothing is known of %q", r.Do)
	}
	return err
}

// A remoteEnd is an end as the test sees it.
type remoteEnd struct {
	t   testing.TB
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

func startEnd(t testing.TB, c endConfig) *remoteEnd {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestEnd$")
	cmd.Env = append(os.Environ(), endVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	started := make(chan error)
	starter() <- func() { started <- cmd.Start() }
	if err := errors.Join(<-started, err1, err2); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close() // it ends then
		kill := time.AfterFunc(stopTimeout, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_, _ = io.Copy(io.Discard, stdout)
		if err := cmd.Wait(); err != nil {
			t.Errorf("an end has ended with: %v", err)
		}
	})
	return &remoteEnd{t: t, cmd: cmd, in: json.NewEncoder(stdin), out: json.NewDecoder(bufio.NewReader(stdout))}
}

func (e *remoteEnd) ask(r request) answer {
	e.t.Helper()
	var a answer
	if err := errors.Join(e.in.Encode(r), e.out.Decode(&a)); err != nil {
		e.t.Fatal(err)
	}
	if a.Error != "" {
		e.t.Fatalf("%s by %s: %s", r.Do, r.By, a.Error)
	}
	return a
}

// quantile is of durations, in microseconds.
func quantile(of []time.Duration, q float64) float64 {
	if len(of) == 0 {
		return 0
	}
	of = slices.Sorted(slices.Values(of))
	return float64(of[min(int(q*float64(len(of))), len(of)-1)]) / float64(time.Microsecond)
}
