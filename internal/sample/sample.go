// Package sample decides which of many alike log lines are worth writing: the
// first of each key, then one in ten seconds that tells how many were left out.
//
//	if left, ok := s.Allow(source + " " + reason); ok {
//		log.Warn("peer refused", zap.Int("suppressed", left))
//	}
//
// Keys may come from strangers: their number is bounded, and those beyond the
// bound share one place. A [Sampler] is for any number of goroutines.
package sample

import (
	"maps"
	"sync"
	"time"
)

const (
	// Every is the time between two lines of one key.
	Every = 10 * time.Second
	// MaxKeys is how many keys are remembered.
	MaxKeys = 1024
)

// A Sampler is ready to use when zero.
type Sampler struct {
	mu   sync.Mutex
	keys map[string]entry
}

type entry struct {
	logged     time.Time
	suppressed int
}

// Allow reports whether to log now, and how many lines of the key were not
// logged since the last one that was.
func (s *Sampler) Allow(key string) (suppressed int, ok bool) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = make(map[string]entry)
	}
	if _, known := s.keys[key]; !known && len(s.keys) >= MaxKeys {
		maps.DeleteFunc(s.keys, func(_ string, e entry) bool { return now.Sub(e.logged) >= Every })
		if len(s.keys) >= MaxKeys {
			key = ""
		}
	}
	e, known := s.keys[key]
	if known && now.Sub(e.logged) < Every {
		e.suppressed++
		s.keys[key] = e
		return 0, false
	}
	s.keys[key] = entry{logged: now}
	return e.suppressed, true
}
