package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"culvert/capture/ruleset"
)

// What a guard does, and how often.
const (
	probeInterval = 10 * time.Second
	probeTimeout  = time.Second
	// settle is how long changes of the host's rules are collected before they
	// are looked at.
	settle = 100 * time.Millisecond
)

// guard sees to it that the rules are there and that what they turn arrives,
// until ctx ends.
func (r *Redirect) guard(ctx context.Context) {
	changes := make(chan struct{}, 1)
	w, err := ruleset.Watch()
	if err != nil {
		r.log.Warn("the rules are looked at now and then only: the host does not tell of changes", zap.Error(err))
	} else {
		done := make(chan struct{})
		go func() {
			defer close(done)
			for w.Wait() == nil {
				select {
				case changes <- struct{}{}:
				default:
				}
			}
		}()
		defer func() { _ = w.Close(); <-done }()
	}
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for {
		r.repair() // at first, of what happened before the watch began
		r.probe(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-changes:
			if !wait(ctx, settle) {
				return
			}
			select {
			case <-changes:
			default:
			}
		}
	}
}

// repair makes the table anew where somebody else has changed it. What the
// operator has let go (culvert capture clear ADDRESS) stays so.
func (r *Redirect) repair() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	found, err := r.table.Read()
	if errors.Is(err, ruleset.ErrDamaged) { // or it was changed while it was read
		found, err = r.table.Read()
	}
	if err != nil && !errors.Is(err, ruleset.ErrNoTable) && !errors.Is(err, ruleset.ErrDamaged) {
		r.log.Error("look at the rules", zap.String("table", r.table.Name()), zap.Error(err))
		return
	}
	if err == nil && maps.Equal(found.Peers, r.state.Peers) {
		for at, name := range r.state.Lost {
			if _, there := found.Lost[at]; !there {
				r.log.Info("an address is not refused any more", zap.Stringer("address", at), zap.String("peer", name))
			}
		}
		r.state.Lost = found.Lost
		r.o.Metrics.setLost(len(found.Lost))
		return
	}
	if err == nil {
		err = errors.New("its peers are not those that were put there")
	}
	r.o.Metrics.countRepair()
	r.log.Warn("somebody has changed the rules of redirect: they are made anew", zap.String("table", r.table.Name()), zap.Error(err))
	if err := r.table.Replace(r.state); err != nil {
		r.log.Error("make the rules anew", zap.String("table", r.table.Name()), zap.Error(err))
	}
}

// A prober knows what the sidecar sends to its own endpoints, in the server's
// place, to find out whether the host lets the server's packets through. It tells
// a firewall that drops them from a peer that is dead.
type prober struct {
	from   atomic.Pointer[netip.AddrPort] // of the probe under way
	result atomic.Pointer[string]         // why the last one failed
}

func (p *prober) expects(from netip.AddrPort) bool {
	at := p.from.Load()
	return at != nil && *at == netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func (p *prober) verdict() string {
	if v := p.result.Load(); v != nil {
		return *v
	}
	return ""
}

// probe sends a packet and makes a connection to a peer as the server would, one
// for each kind of service. Both are answered here.
func (r *Redirect) probe(ctx context.Context) {
	verdict := ""
	if err := r.tryProbe(ctx); err != nil {
		verdict = err.Error()
	}
	if ctx.Err() != nil {
		return
	}
	was := r.probed.verdict()
	r.probed.result.Store(&verdict)
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

// probeTargets is one service of each kind, of any peer; none without peers.
func (r *Redirect) probeTargets() []probeTarget {
	r.mu.Lock()
	defer r.mu.Unlock()
	var targets []probeTarget
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
	return targets
}

// tryProbe returns what keeps a packet or a connection from its endpoint, or its
// answer from coming back.
func (r *Redirect) tryProbe(ctx context.Context) error {
	targets := r.probeTargets()
	if len(targets) == 0 {
		return nil
	}
	c, err := net.ListenUDP("udp"+family(r.o.Server), net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.o.Server, 0)))
	if err != nil {
		return fmt.Errorf("open a socket at %s: %w", r.o.Server, err)
	}
	defer func() { _ = c.Close() }()
	from := c.LocalAddr().(*net.UDPAddr).AddrPort() //nolint:errcheck,forcetypeassert // of a UDP socket
	r.probed.from.Store(&from)
	defer r.probed.from.Store(nil)
	for _, to := range targets {
		what, err := "a packet", error(nil)
		if to.packet {
			err = probePacket(c, to.at)
		} else {
			what, err = "a connection", probeStream(ctx, from, to.at)
		}
		if err != nil {
			return fmt.Errorf("%s from %s to %s did not arrive on the loopback interface, or its answer did not: %w", what, r.o.Server, to.at, err)
		}
	}
	return nil
}

func probePacket(c *net.UDPConn, to netip.AddrPort) error {
	if _, err := c.WriteToUDPAddrPort([]byte("culvert"), to); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(probeTimeout)); err != nil {
		return err
	}
	_, _, err := c.ReadFromUDPAddrPort(make([]byte, 16))
	return err
}

// probeStream dials from a port that is known before, so that the other end can
// tell it from the server.
func probeStream(ctx context.Context, from, to netip.AddrPort) error {
	d := net.Dialer{Timeout: probeTimeout, LocalAddr: net.TCPAddrFromAddrPort(from)}
	c, err := d.DialContext(ctx, "tcp"+family(to.Addr()), to.String())
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil // somebody has this port for TCP: another time
	}
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(probeTimeout))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
