package stream

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/catalog"
	"culvert/internal/pipe"
	"culvert/stream/session"
)

// maxPeerSessions bounds the sessions that one peer may have begun. Each may hold
// a window's worth of what the local server does not read, for each of its streams.
const maxPeerSessions = 2 * maxSessions

// drainPoll is how often a drain looks for sessions whose streams have ended.
const drainPoll = 20 * time.Millisecond

// sessions are those that peers have begun.
type sessions struct {
	mu       sync.Mutex
	open     map[*session.Session]catalog.Key
	draining bool
}

// ServeSession serves the streams of a session, each as [Inbound.ServeConn] does,
// until the session has ended or ctx has. It owns c.
func (i *Inbound) ServeSession(ctx context.Context, from catalog.Key, c session.Conn) {
	s, err := session.Accept(c, session.Options{Log: i.log})
	if err != nil {
		i.log.Debug("session not begun", zap.Stringer("peer", from), zap.Error(err))
		return
	}
	if !i.sessions.add(s, from) {
		i.log.Debug("session not taken", zap.Stringer("peer", from), zap.Int("at most", maxPeerSessions))
		_ = s.Close() // it returns nil
		s.Wait()
		return
	}
	i.m.sessions(in).Inc()
	defer i.m.sessions(in).Dec()
	defer i.sessions.remove(s)
	defer context.AfterFunc(ctx, func() { pipe.Abort(c) })()
	err = s.Serve(func(st *session.Stream) {
		if !slices.Contains(i.o.Services, st.Service()) {
			i.log.Debug("stream to an unknown service", zap.Stringer("peer", from), zap.String("service", st.Service()))
			turnAway(st, session.UnknownService)
			return
		}
		i.ServeConn(ctx, from, st.Service(), Untyped, st)
	})
	if err != nil {
		i.log.Debug("session ended", zap.Stringer("peer", from), zap.Error(err))
	}
}

// Drain tells every peer that its sessions take no more streams, and ends each when
// its last one has ended. It returns when all have, or ctx has.
func (i *Inbound) Drain(ctx context.Context) {
	left := i.sessions.drain()
	for _, s := range left {
		if err := s.GoAway(); err != nil {
			i.log.Debug("session ended", zap.Error(err))
		}
	}
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for len(left) > 0 && ctx.Err() == nil {
		left = slices.DeleteFunc(left, func(s *session.Session) bool {
			if s.Streams() > 0 {
				return false
			}
			_ = s.Close() // it returns nil
			return true
		})
		if len(left) == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (ss *sessions) add(s *session.Session, from catalog.Key) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	n := 0
	for _, peer := range ss.open {
		if peer == from {
			n++
		}
	}
	if ss.draining || n >= maxPeerSessions {
		return false
	}
	if ss.open == nil {
		ss.open = make(map[*session.Session]catalog.Key)
	}
	ss.open[s] = from
	return true
}

func (ss *sessions) remove(s *session.Session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.open, s)
}

func (ss *sessions) drain() []*session.Session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.draining = true
	open := make([]*session.Session, 0, len(ss.open))
	for s := range ss.open {
		open = append(open, s)
	}
	return open
}
