package mux

import (
	"container/list"
	"context"
	"net"
	"net/netip"
	"sync"

	"go.uber.org/zap"

	"culvert/internal/pipe"
	"culvert/sniff"
)

// A place is one connection's place in a server, from its accept to its end.
type place struct {
	s        *Server
	raw      net.Conn
	conn     *sniff.Conn
	source   netip.Prefix
	cancel   context.CancelFunc // ends the handler's context
	released context.Context    // ends when lasting connections shall go

	at     *list.Element // among the pending ones; guarded by pending.mu
	remove func()        // out of the set of established ones
	stop   func() bool
}

// enter makes the connection a pending one, which may cost another its place.
// It reports false after a drain has begun.
func (c *place) enter() bool {
	oldest, ok := c.s.pending.add(c)
	if oldest != nil {
		oldest.giveUp()
		c.s.o.Metrics.Refused(reasonLimitPending)
		if suppressed, ok := c.s.warn.Allow("pending"); ok {
			c.s.log.Warn("too many connections at once that are not established: the oldest makes room",
				zap.Int("pending", c.s.o.MaxPending), zap.Stringer("source", oldest.source), zap.Int("suppressed", suppressed))
		}
	}
	return ok
}

// establish is the handler's [Establish].
func (c *place) establish(lasting bool) bool {
	if !c.s.pending.remove(c) {
		return false
	}
	c.conn.Release()
	set := c.s.ending
	if lasting {
		set = c.s.lasting
		c.stop = context.AfterFunc(c.released, c.cancel)
	}
	var ok bool
	c.remove, ok = set.Add(c.raw)
	return ok
}

// giveUp ends a connection that was pending and is not any more.
func (c *place) giveUp() {
	pipe.Abort(c.raw)
	c.cancel()
}

// leave takes the connection out of wherever it is. Its handler has returned.
func (c *place) leave() {
	c.s.pending.remove(c)
	c.conn.Release()
	if c.stop != nil {
		c.stop()
	}
	if c.remove != nil {
		c.remove()
	}
}

// pending are the connections that are not established, in the order of their
// arrival.
type pending struct {
	max int

	mu      sync.Mutex
	closed  bool
	order   list.List // of *place, the oldest first
	sources map[netip.Prefix]int
}

// add puts a connection in. Where there are too many then it takes another out
// and returns it. It reports false, and keeps nothing, after close.
func (p *pending) add(c *place) (out *place, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, false
	}
	if p.order.Len() >= p.max {
		out = p.oldestOfMost()
		p.take(out)
	}
	if p.sources == nil {
		p.sources = make(map[netip.Prefix]int)
	}
	p.sources[c.source]++
	c.at = p.order.PushBack(c)
	return out, true
}

// oldestOfMost returns the connection that is the least likely to come to
// anything: who dials in earnest has few under way, and not for long. Called
// with mu held, while there are some.
func (p *pending) oldestOfMost() *place {
	most := 0
	for _, n := range p.sources {
		most = max(most, n)
	}
	for e := p.order.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*place); p.sources[c.source] == most { //nolint:errcheck,forcetypeassert // the list holds nothing else
			return c
		}
	}
	return nil // not reached: each source that is counted has a connection here
}

// remove takes a connection out, and reports whether it was there.
func (p *pending) remove(c *place) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.at == nil {
		return false
	}
	p.take(c)
	return true
}

// take takes a connection out that is there. Called with mu held.
func (p *pending) take(c *place) {
	p.order.Remove(c.at)
	c.at = nil
	if p.sources[c.source]--; p.sources[c.source] == 0 {
		delete(p.sources, c.source)
	}
}

// close takes all out and lets no more in.
func (p *pending) close() []*place {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var all []*place
	for e := p.order.Front(); e != nil; e = p.order.Front() {
		c := e.Value.(*place) //nolint:errcheck,forcetypeassert // the list holds nothing else
		p.take(c)
		all = append(all, c)
	}
	return all
}
