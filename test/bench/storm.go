package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	stormConns = 64 // handshakes at a time
	calmTime   = 500 * time.Millisecond
	stormTime  = 1500 * time.Millisecond
	pingEvery  = 2 * time.Millisecond
	stormPeer  = "127.86.0.2"

	packetProtocol = "culvert/packet/1/pings"
)

const rowPackets = "Culvert, packets, one way"

// A pinger measures how long bytes take over a connection that is established: until
// they are back, or across, for so long.
type pinger func(ctx context.Context, during time.Duration) ([]time.Duration, error)

// stormTopic is what those who are established notice of a storm of handshakes. The
// storm comes from a process that has what processors are left, as a peer on other
// hosts would leave all of them.
func stormTopic(ctx context.Context, b *bench) (*topic, error) {
	f := &fleet{}
	t := &topic{
		title: fmt.Sprintf("a byte every %v over an established connection, while %d peers at a time make full handshakes",
			pingEvery, stormConns),
		columns: []string{"p99 ms", "p50 ms", "p99 ms when calm", "handshakes/s"},
		close:   f.close,
	}
	for _, k := range sidecarKinds(b.culvert) {
		t.rows = append(t.rows, f.sidecarRows(ctx, b, k, &row{name: k.name, of: func(ctx context.Context, p *proxy) ([]float64, error) {
			c, err := secure(p.address, b.peerConfig())(ctx, nil, ask(askEcho, 0))
			if err != nil {
				return nil, err
			}
			defer func() { _ = c.Close() }()
			return b.inStorm(ctx, p, echoes(c))
		}})...)
	}
	t.rows = append(t.rows, b.packetRow(ctx, f))
	return t, nil
}

// packetRow is for packets of a peer to the local server.
func (b *bench) packetRow(ctx context.Context, f *fleet) *row {
	r := &row{name: rowPackets}
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		r.err = err
		return r
	}
	f.end = append(f.end, udp.Close)
	server, err := newLocal(plain)
	if err != nil {
		r.err = err
		return r
	}
	f.end = append(f.end, func() error { server.close(); return nil })
	free, err := freeAddress()
	if err != nil {
		r.err = err
		return r
	}
	_, port, _ := net.SplitHostPort(free) // it has been made of the two
	s := settings{Local: server.address(), Packets: udp.LocalAddr().String(), Peer: stormPeer}
	if s.Port, err = strconv.Atoi(port); err != nil {
		r.err = err
		return r
	}
	return f.add(ctx, b, kind{name: rowPackets, program: b.culvert, conf: "sidecar.hcl", args: []string{"sidecar", "--config", "CONF"}}, s,
		func(ctx context.Context, p *proxy) ([]float64, error) {
			config := b.peerConfig()
			config.NextProtos = []string{packetProtocol}
			c, err := secure(p.address, config)(ctx, nil, nil)
			if err != nil {
				return nil, err
			}
			defer func() { _ = c.Close() }()
			return b.inStorm(ctx, p, packets(c, udp))
		})
}

// inStorm measures when it is calm, and then in a storm.
func (b *bench) inStorm(ctx context.Context, p *proxy, ping pinger) ([]float64, error) {
	calm, err := ping(ctx, calmTime)
	if err != nil {
		return nil, errors.Join(err, p.check())
	}
	stop, err := b.startStorm(ctx, p.address)
	if err != nil {
		return nil, err
	}
	times, err := ping(ctx, stormTime)
	handshakes, stopErr := stop()
	if err = errors.Join(err, stopErr); err != nil {
		return nil, errors.Join(err, p.check())
	}
	return []float64{percentile(times, 99), percentile(times, 50), percentile(calm, 99), handshakes}, nil
}

// percentile returns one in milliseconds.
func percentile(times []time.Duration, p int) float64 {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return float64(times[min(len(times)-1, len(times)*p/100)].Microseconds()) / 1000
}

// echoes sends a byte and waits for it.
func echoes(c net.Conn) pinger {
	return func(ctx context.Context, during time.Duration) (times []time.Duration, err error) {
		err = every(ctx, during, func() error {
			began := time.Now()
			if _, err := c.Write([]byte{1}); err != nil {
				return err
			}
			err := readByte(c)
			times = append(times, time.Since(began))
			return err
		})
		return times, err
	}
}

// packets sends frames that say when they were sent, and takes them where the local
// server would.
func packets(c net.Conn, udp *net.UDPConn) pinger {
	return func(ctx context.Context, during time.Duration) (times []time.Duration, err error) {
		if err := udp.SetReadDeadline(time.Now().Add(during + time.Second)); err != nil {
			return nil, err
		}
		began, sent := time.Now(), 0
		received := make(chan error, 1)
		go func() {
			for {
				var b [8]byte
				n, err := udp.Read(b[:])
				if n == len(b) && err == nil {
					at := time.Duration(binary.BigEndian.Uint64(b[:]))
					if at == 0 { // the last
						received <- nil
						return
					}
					times = append(times, time.Since(began)-at)
				}
				if err != nil {
					received <- fmt.Errorf("%d packets have come: %w", len(times), err)
					return
				}
			}
		}()
		send := func(at time.Duration) error {
			frame := binary.BigEndian.AppendUint32(nil, 8)
			_, err := c.Write(binary.BigEndian.AppendUint64(frame, uint64(at)))
			return err
		}
		err = every(ctx, during, func() error { sent++; return send(time.Since(began)) })
		err = errors.Join(err, send(0), <-received)
		if err == nil && len(times) < sent*9/10 {
			err = fmt.Errorf("%d of %d packets have come", len(times), sent)
		}
		return times, err
	}
}

// every calls f at the pings' pace for a while.
func every(ctx context.Context, during time.Duration, f func() error) error {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	end := time.NewTimer(during)
	defer end.Stop()
	for {
		select {
		case <-tick.C:
			if err := f(); err != nil {
				return err
			}
		case <-end.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// startStorm starts this program anew as the storm. stop ends it, and returns its
// handshakes a second.
func (b *bench) startStorm(ctx context.Context, address string) (stop func() (float64, error), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "--storm", address, b.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	hold, err := cmd.StdinPipe() // its end, ours included, is the end of the storm
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() (float64, error) {
		err := errors.Join(hold.Close(), cmd.Wait())
		if err != nil {
			return 0, fmt.Errorf("storm: %w: %s", err, bytes.TrimSpace(errOut.Bytes()))
		}
		return strconv.ParseFloat(string(bytes.TrimSpace(out.Bytes())), 64)
	}, nil
}

// storm makes handshakes until the input ends, and prints how many a second.
func storm(ctx context.Context, address, dir string, in io.Reader, out io.Writer) error {
	if err := syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19); err != nil {
		return fmt.Errorf("step back: %w", err)
	}
	b, err := newStorm(dir)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, in)
		stop()
	}()
	open := secure(address, b.peerConfig())
	began := time.Now()
	var made atomic.Int64
	err = inParallel(stormConns, func(int) error {
		for ctx.Err() == nil {
			c, err := open(ctx, nil, ask(askEcho, 0))
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the storm is over
			}
			if err != nil {
				return err
			}
			made.Add(1)
			_ = c.Close()
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%f\n", float64(made.Load())/time.Since(began).Seconds())
	return err
}
