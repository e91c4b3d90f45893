package capture

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
)

const (
	probeTimeout = time.Second
	// lateProbe is how long the connection of a probe that has failed may still
	// come out of the kernel's queue.
	lateProbe = time.Minute
)

// A prober knows what the sidecar sends to its own endpoints, in the server's
// place, to find out whether the host lets the server's packets through. It tells
// a firewall that drops them from a peer that is dead. None of it goes to a peer.
type prober struct {
	token   [16]byte // in each packet; random, so that no server's packet is one
	verdict atomic.Pointer[string]

	mu      sync.Mutex
	streams map[netip.AddrPort]time.Time // where connections come from, and until when
}

func newProber() *prober {
	p := &prober{streams: make(map[netip.AddrPort]time.Time)}
	_, _ = rand.Read(p.token[:]) // it never fails
	return p
}

func (p *prober) isPacket(payload []byte) bool { return bytes.Equal(payload, p.token[:]) }

func (p *prober) isStream(from netip.AddrPort) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, ok := p.streams[from]
	return ok && time.Now().Before(until)
}

// expect takes a connection from an address for a probe's until forget, and no
// longer than lateProbe.
func (p *prober) expect(from netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for at, until := range p.streams {
		if now.After(until) {
			delete(p.streams, at)
		}
	}
	p.streams[from] = now.Add(lateProbe)
}

func (p *prober) forget(from netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.streams, from)
}

func (p *prober) result() string {
	if v := p.verdict.Load(); v != nil {
		return *v
	}
	return ""
}

// probes tries the server's way at intervals, and when it is asked to, until ctx
// ends. One failure may be a busy moment: the second one in a row tells.
func (r *Redirect) probes(ctx context.Context, asked <-chan struct{}) {
	for failures := 0; ; {
		err := r.probe(ctx)
		if ctx.Err() != nil {
			return
		}
		next := lookInterval
		if err != nil {
			failures++
			next = retryAfter
		} else {
			failures = 0
		}
		if failures != 1 {
			r.judge(err)
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-asked:
			t.Stop()
		case <-t.C:
		}
	}
}

// judge tells of a firewall that is in the way, and of one that is not any more.
func (r *Redirect) judge(err error) {
	verdict := ""
	if err != nil {
		verdict = err.Error()
	}
	was := r.probed.result()
	r.probed.verdict.Store(&verdict)
	r.o.Metrics.setBlocked(verdict != "")
	switch {
	case verdict != "" && was == "":
		r.log.Error("the host's own firewall keeps the server from its peers' endpoints",
			zap.String("found", verdict), zap.String("hint", blockedHint))
	case verdict == "" && was != "":
		r.log.Info("the server reaches its peers' endpoints again")
	}
}

// blockedHint is what the operator can do where a probe fails.
const blockedHint = "what redirect turns is not tracked, so a rule on ct state does not know it: " +
	"accept the loopback interface before such rules, as `iif lo accept` in nftables or `-i lo -j ACCEPT` in iptables"

type probeTarget struct {
	at     netip.AddrPort
	packet bool
}

// probeTargets is one service of each kind, of any peer; none without peers. The
// number changes with the peers.
func (r *Redirect) probeTargets() (targets []probeTarget, generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for peer := range r.state.Peers {
		for _, packet := range []bool{true, false} {
			for _, s := range r.sockets {
				if s.service.Packet == packet {
					targets = append(targets, probeTarget{netip.AddrPortFrom(peer, s.service.Port), packet})
					break
				}
			}
		}
		break
	}
	return targets, r.generation
}

// probe sends a packet and makes a connection to a peer as the server would. Both
// are answered here, from the peer's address. It returns what keeps them from their endpoint, or the
// answers from coming back.
func (r *Redirect) probe(ctx context.Context) error {
	targets, generation := r.probeTargets()
	for _, to := range targets {
		what, err := "a packet", error(nil)
		if to.packet {
			err = r.probePacket(ctx, to.at)
		} else if !r.accept.full() { // it would wait like others
			what, err = "a connection", r.probeStream(ctx, to.at)
		}
		if err == nil {
			continue
		}
		if _, now := r.probeTargets(); now != generation {
			return nil // it may have been for a peer that has left
		}
		return fmt.Errorf("%s from %s to %s did not arrive on the loopback interface, or its answer did not: %w", what, r.o.Server, to.at, err)
	}
	return nil
}

func (r *Redirect) probePacket(ctx context.Context, to netip.AddrPort) error {
	c, err := net.ListenUDP("udp"+family(to.Addr()), net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.o.Server, 0)))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	if err := c.SetReadDeadline(time.Now().Add(probeTimeout)); err != nil {
		return err
	}
	if _, err := c.WriteToUDPAddrPort(r.probed.token[:], to); err != nil {
		return err
	}
	_, from, err := c.ReadFromUDPAddrPort(make([]byte, len(r.probed.token)))
	if err == nil && from != to {
		return fmt.Errorf("it came from %s", from)
	}
	return err
}

// probeStream dials from a port that is known before, so that the other end can
// tell it from the server: one that a UDP socket was given. TCP may have it taken,
// and then there is nothing to be said this time.
func (r *Redirect) probeStream(ctx context.Context, to netip.AddrPort) error {
	lent, err := net.ListenUDP("udp"+family(to.Addr()), net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.o.Server, 0)))
	if err != nil {
		return err
	}
	defer func() { _ = lent.Close() }()
	from := lent.LocalAddr().(*net.UDPAddr).AddrPort() //nolint:errcheck,forcetypeassert // of a UDP socket
	r.probed.expect(from)
	d := net.Dialer{Timeout: probeTimeout, LocalAddr: net.TCPAddrFromAddrPort(from)}
	c, err := d.DialContext(ctx, "tcp"+family(to.Addr()), to.String())
	if errors.Is(err, syscall.EADDRINUSE) {
		r.probed.forget(from)
		return nil
	}
	if err != nil {
		return err // the kernel may hand it out later
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(probeTimeout))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return err
	}
	r.probed.forget(from)
	return nil
}
