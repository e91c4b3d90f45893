package link

import (
	"testing"
	"testing/synctest"
	"time"
)

// What has not come counts as long as it was waited for, what comes twice once, and
// what is of an earlier series or of another size not at all.
func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m meter
		packet := func() []byte {
			p := make([]byte, packetSize)
			m.stamp(p)
			return p
		}
		m.reset()
		old := packet()
		time.Sleep(time.Second)
		m.reset()
		var all [][]byte
		for range 100 {
			all = append(all, packet())
		}
		time.Sleep(10 * time.Millisecond)
		for _, p := range all[:98] {
			m.note(p)
		}
		time.Sleep(10 * time.Millisecond)
		m.note(old)
		m.note(all[99][:8])
		m.note(all[0])
		if m.all() {
			t.Error("two packets have not come, and it says that all have")
		}
		m.note(all[98])
		time.Sleep(time.Second)
		want := spread{p50: 10 * time.Millisecond, p99: 20 * time.Millisecond, come: 0.99}
		if got := m.spread(); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		m.note(all[99])
		if !m.all() {
			t.Error("all packets have come, and it says that some have not")
		}
	})
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.of); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.of, got, c.want)
		}
	}
}
