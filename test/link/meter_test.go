package link

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"
)

func netipPort(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// A meter takes down how long numbered packets took, one way. Both ends are in
// this process, and its clock is one.
type meter struct {
	mu    sync.Mutex
	began time.Time
	took  []time.Duration // 0: has not come
	sent  []time.Duration // since began
	come  int
}

const (
	packetSize  = 200
	packetEvery = 2500 * time.Microsecond
)

func (m *meter) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.began, m.took, m.sent, m.come = time.Now(), nil, nil, 0
}

// stamp makes a packet, of the next number.
func (m *meter) stamp(p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	binary.BigEndian.PutUint64(p, uint64(len(m.sent)))
	binary.BigEndian.PutUint64(p[8:], uint64(m.began.UnixNano()))
	m.sent, m.took = append(m.sent, time.Since(m.began)), append(m.took, 0)
}

// note takes down that a packet has come. One of an earlier series is none.
func (m *meter) note(p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(p) != packetSize || binary.BigEndian.Uint64(p[8:]) != uint64(m.began.UnixNano()) {
		return
	}
	n := binary.BigEndian.Uint64(p)
	if n < uint64(len(m.took)) && m.took[n] == 0 {
		m.took[n] = time.Since(m.began) - m.sent[n]
		m.come++
	}
}

func (m *meter) all() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.come == len(m.sent)
}

// A spread is how long packets took: one that has not come counts as long as it was
// waited for.
type spread struct {
	p50, p99 time.Duration
	come     float64 // share
}

func (m *meter) spread() spread {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := slices.Clone(m.took)
	for i := range all {
		if all[i] == 0 {
			all[i] = time.Since(m.began) - m.sent[i]
		}
	}
	slices.Sort(all)
	at := func(q float64) time.Duration { return all[int(q*float64(len(all)-1))] }
	return spread{at(0.5), at(0.99), float64(m.come) / float64(len(all))}
}
