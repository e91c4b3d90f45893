package packet

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// keepaliveAfter is how long a two-way connection is silent before it is kept alive by an empty frame: between
	// these two, so that those of many peers do not come together.
	keepaliveAfter  = 13 * time.Second
	keepaliveSpread = 4 * time.Second
	// deadAfter is how long nothing may arrive on a two-way connection. Two keepalives fit in it.
	deadAfter = 45 * time.Second
	// beatInterval is how exactly these are kept, and the idle limit of one-way connections.
	beatInterval = time.Second
)

// Pulse is the clock by which the connections of all links of a process are kept alive, or found to be dead or idle:
// one goroutine for all. It counts seconds in which the process ran, so that one that was suspended does not take
// its peers for dead.
type Pulse struct {
	seconds atomic.Int64

	mu    sync.Mutex
	links map[*Link]struct{}
	order []*Link // of links, for one beat
}

// NewPulse returns a pulse without links.
func NewPulse() *Pulse { return &Pulse{links: make(map[*Link]struct{})} }

// Run beats until ctx ends, and returns nil.
func (p *Pulse) Run(ctx context.Context) error {
	t := time.NewTicker(beatInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			p.beat()
		case <-ctx.Done():
			return nil
		}
	}
}

func (p *Pulse) beat() {
	now := p.seconds.Add(1)
	p.mu.Lock()
	p.order = p.order[:0]
	for l := range p.links {
		p.order = append(p.order, l)
	}
	p.mu.Unlock()
	for _, l := range p.order { // nobody else uses it
		l.beat(now)
	}
	clear(p.order)
}

func (p *Pulse) now() int64 { return p.seconds.Load() }

func (p *Pulse) add(l *Link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.links[l] = struct{}{}
}

func (p *Pulse) remove(l *Link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.links, l)
}
