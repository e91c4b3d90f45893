package sidecar

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"culvert/catalog"
	"culvert/packet"
)

// Links are connected from the start. So that their handshakes do not come all at
// once, they are spread over this much and so much more for each.
const (
	dialSpread   = 500 * time.Millisecond
	dialInterval = 2 * time.Millisecond
)

// links keeps one packet link for each peer and packet service, and follows
// the catalog.
type links struct {
	services []string
	newLink  func(linkKey, packet.LinkOptions) *packet.Link
	pulse    *packet.Pulse

	byRoute atomic.Pointer[map[linkKey]*packet.Link] // what the data path reads; replaced whole

	mu    sync.Mutex
	ctx   context.Context // run's, for links that set adds later
	ended bool            // run has stopped starting links
}

type linkKey struct {
	peer    catalog.Key
	service string
}

// newLinks makes each link with newLink, which is given some of its options.
func newLinks(services []string, newLink func(linkKey, packet.LinkOptions) *packet.Link) *links {
	l := &links{services: services, newLink: newLink, pulse: packet.NewPulse()}
	l.byRoute.Store(&map[linkKey]*packet.Link{})
	return l
}

// set makes peers the set of those that have links. It returns when the links
// of those that left have ended, so that their counts can be forgotten.
func (l *links) set(peers []catalog.Peer) {
	l.mu.Lock()
	old := *l.byRoute.Load()
	next := make(map[linkKey]*packet.Link, len(peers)*len(l.services))
	for _, p := range peers {
		for _, service := range l.services {
			key := linkKey{p.Key, service}
			next[key] = old[key]
			if next[key] == nil {
				next[key] = l.newLink(key, packet.LinkOptions{
					Peer: key.peer, Service: service, Pulse: l.pulse,
					Spread: dialSpread + time.Duration(len(peers)*len(l.services))*dialInterval,
				})
				if l.ctx != nil && !l.ended {
					next[key].Start(l.ctx)
				}
			}
		}
	}
	l.byRoute.Store(&next)
	l.mu.Unlock()
	gone := make(map[linkKey]*packet.Link)
	for key, k := range old {
		if next[key] == nil {
			gone[key] = k
		}
	}
	stop(gone)
}

func stop(all map[linkKey]*packet.Link) {
	var wg sync.WaitGroup
	for _, k := range all {
		wg.Go(k.Stop)
	}
	wg.Wait()
}

// run runs every link until ctx ends.
func (l *links) run(ctx context.Context) error {
	l.mu.Lock()
	if l.ctx != nil {
		l.mu.Unlock()
		return errors.New("links run twice")
	}
	l.ctx = context.WithoutCancel(ctx) // the links are stopped
	for _, k := range *l.byRoute.Load() {
		k.Start(l.ctx)
	}
	l.mu.Unlock()
	err := l.pulse.Run(ctx)
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	stop(*l.byRoute.Load())
	return err
}

// of returns the link to a peer, nil if there is none.
func (l *links) of(peer catalog.Key, service string) *packet.Link {
	return (*l.byRoute.Load())[linkKey{peer, service}]
}

// send queues a packet for a peer; false if there is no such link.
func (l *links) send(to catalog.Key, service string, payload []byte, more bool) bool {
	k := l.of(to, service)
	if k == nil {
		return false
	}
	k.Send(payload, more)
	return true
}

// status returns the links of a peer.
func (l *links) status(peer catalog.Key) []packet.LinkStatus {
	var out []packet.LinkStatus
	for _, service := range l.services {
		if k := l.of(peer, service); k != nil {
			out = append(out, k.Status())
		}
	}
	return out
}
