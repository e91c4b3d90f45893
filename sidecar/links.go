package sidecar

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"culvert/catalog"
	"culvert/packet"
)

// links keeps one packet link for each peer and packet service, and follows
// the catalog.
type links struct {
	services []string
	dial     func(ctx context.Context, to catalog.Key, service string) (packet.Conn, error)
	o        packet.LinkOptions

	byRoute atomic.Pointer[map[linkKey]*link] // what the data path reads; replaced whole

	mu    sync.Mutex
	ctx   context.Context // run's, for links that set adds later
	ended bool            // run has stopped starting links
	wg    sync.WaitGroup
}

type linkKey struct {
	peer    catalog.Key
	service string
}

type link struct {
	*packet.Link
	stop context.CancelFunc // nil until the link runs
	done chan struct{}      // closed when it has ended
}

func newLinks(services []string, dial func(context.Context, catalog.Key, string) (packet.Conn, error), o packet.LinkOptions) *links {
	l := &links{services: services, dial: dial, o: o}
	l.byRoute.Store(&map[linkKey]*link{})
	return l
}

// set makes peers the set of those that have links. It returns when the links
// of those that left have ended, so that their counts can be forgotten.
func (l *links) set(peers []catalog.Peer) {
	l.mu.Lock()
	old := *l.byRoute.Load()
	next := make(map[linkKey]*link, len(peers)*len(l.services))
	for _, p := range peers {
		for _, service := range l.services {
			key := linkKey{p.Key, service}
			next[key] = old[key]
			if next[key] == nil {
				next[key] = l.newLink(key)
				l.start(next[key])
			}
		}
	}
	l.byRoute.Store(&next)
	l.mu.Unlock()
	for key, gone := range old {
		if next[key] == nil && gone.stop != nil {
			gone.stop()
			<-gone.done
		}
	}
}

func (l *links) newLink(key linkKey) *link {
	o := l.o
	o.Peer, o.Service = key.peer, key.service
	dial := func(ctx context.Context) (packet.Conn, error) { return l.dial(ctx, key.peer, key.service) }
	return &link{Link: packet.NewLink(dial, o), done: make(chan struct{})}
}

// start runs a link, once run has been called. Called with mu held.
func (l *links) start(k *link) {
	if l.ctx == nil || l.ended {
		return
	}
	ctx, stop := context.WithCancel(l.ctx)
	k.stop = stop
	l.wg.Go(func() {
		defer close(k.done)
		defer stop()
		_ = k.Run(ctx) // it returns nil
	})
}

// run runs every link until ctx ends.
func (l *links) run(ctx context.Context) error {
	l.mu.Lock()
	if l.ctx != nil {
		l.mu.Unlock()
		return errors.New("links run twice")
	}
	l.ctx = ctx
	for _, k := range *l.byRoute.Load() {
		l.start(k)
	}
	l.mu.Unlock()
	<-ctx.Done()
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.wg.Wait()
	return nil
}

// send queues a packet for a peer; false if there is no such link.
func (l *links) send(to catalog.Key, service string, payload []byte) bool {
	k := (*l.byRoute.Load())[linkKey{to, service}]
	if k == nil {
		return false
	}
	k.Send(payload)
	return true
}

// status returns the links of a peer.
func (l *links) status(peer catalog.Key) []packet.LinkStatus {
	var out []packet.LinkStatus
	all := *l.byRoute.Load()
	for _, service := range l.services {
		if k := all[linkKey{peer, service}]; k != nil {
			out = append(out, k.Status())
		}
	}
	return out
}
