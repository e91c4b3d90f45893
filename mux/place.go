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

// A Place is one connection's place in a server, from its accept to its end.
type Place struct {
	s        *Server
	raw      net.Conn
	conn     *sniff.Conn
	source   netip.Prefix
	cancel   context.CancelFunc // ends the handler's context
	released context.Context    // ends when lasting connections shall go

	at     *list.Element // among the pending ones; guarded by pending.mu
	remove func()        // out of the set of established ones
	stop   func() bool

	mu      sync.Mutex
	kept    bool   // the handler goes on with it when it has returned
	abort   func() // what resets it then; nil until that is known
	aborted bool
}

// Keep is for a handler that goes on with the connection after it has returned, by
// no goroutine of the server's. It calls begin, which is given what is to be called
// once, from any goroutine, at the end, and returns what resets the connection. The
// server does that in place of its own reset, as it must not touch the connection any
// more, and also where it would have ended the handler's context. It is called once,
// when the connection is established, and no other function of it is called after
// it.
func (c *Place) Keep(begin func(leave func()) (abort func())) {
	c.mu.Lock()
	c.kept = true
	c.mu.Unlock()
	c.s.wg.Add(1)
	abort := begin(func() {
		c.end()
		c.s.wg.Done()
	})
	c.mu.Lock()
	c.abort = abort
	aborted := c.aborted
	c.mu.Unlock()
	if aborted {
		abort()
	}
}

// established is a place among the established connections, where it is reset as
// its handler wants.
type established struct {
	net.Conn
	place *Place
}

// Abort resets the connection.
func (e established) Abort() { e.place.reset() }

// reset ends the connection, whoever has it.
func (c *Place) reset() {
	c.mu.Lock()
	c.aborted = true
	kept, abort := c.kept, c.abort
	c.mu.Unlock()
	switch {
	case !kept:
		pipe.Abort(c.raw)
	case abort != nil:
		abort()
	}
}

// release asks a lasting connection to go.
func (c *Place) release() {
	c.cancel()
	c.mu.Lock()
	kept := c.kept
	c.mu.Unlock()
	if kept {
		c.reset()
	}
}

// enter makes the connection a pending one, which may cost another its place.
// It reports false after a drain has begun.
func (c *Place) enter() bool {
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

// Establish is the handler's [Establish].
func (c *Place) Establish(lasting bool) bool {
	if !c.s.pending.remove(c) {
		return false
	}
	c.conn.Release()
	set := c.s.ending
	if lasting {
		set = c.s.lasting
		c.stop = context.AfterFunc(c.released, c.release)
	}
	var ok bool
	c.remove, ok = set.Add(established{c.raw, c})
	return ok
}

// giveUp ends a connection that was pending and is not any more.
func (c *Place) giveUp() {
	pipe.Abort(c.raw)
	c.cancel()
}

// returned is the end of the connection, unless its handler has kept it.
func (c *Place) returned() {
	c.mu.Lock()
	kept := c.kept
	c.mu.Unlock()
	if !kept {
		c.end()
	}
}

// end takes the connection out of wherever it is.
func (c *Place) end() {
	c.s.pending.remove(c)
	c.conn.Release()
	if c.stop != nil {
		c.stop()
	}
	if c.remove != nil {
		c.remove()
	}
	c.cancel()
	c.s.o.Metrics.open.Dec()
	c.s.leave(c.source)
	<-c.s.slots
}

// pending are the connections that are not established, in the order of their
// arrival.
type pending struct {
	max int

	mu      sync.Mutex
	closed  bool
	order   list.List // of *Place, the oldest first
	sources map[netip.Prefix]int
}

// add puts a connection in. Where there are too many then it takes another out
// and returns it. It reports false, and keeps nothing, after close.
func (p *pending) add(c *Place) (out *Place, ok bool) {
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
func (p *pending) oldestOfMost() *Place {
	most := 0
	for _, n := range p.sources {
		most = max(most, n)
	}
	for e := p.order.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*Place); p.sources[c.source] == most { //nolint:errcheck,forcetypeassert // the list holds nothing else
			return c
		}
	}
	return nil // not reached: each source that is counted has a connection here
}

// remove takes a connection out, and reports whether it was there.
func (p *pending) remove(c *Place) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.at == nil {
		return false
	}
	p.take(c)
	return true
}

// take takes a connection out that is there. Called with mu held.
func (p *pending) take(c *Place) {
	p.order.Remove(c.at)
	c.at = nil
	if p.sources[c.source]--; p.sources[c.source] == 0 {
		delete(p.sources, c.source)
	}
}

// close takes all out and lets no more in.
func (p *pending) close() []*Place {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var all []*Place
	for e := p.order.Front(); e != nil; e = p.order.Front() {
		c := e.Value.(*Place) //nolint:errcheck,forcetypeassert // the list holds nothing else
		p.take(c)
		all = append(all, c)
	}
	return all
}
