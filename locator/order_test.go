package locator

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestTheBetterOfTwo(t *testing.T) {
	share := func(t *testing.T, p *Pool) map[string]int {
		t.Helper()
		got := make(map[string]int)
		for range 300 {
			endpoint, _ := dial(t, p)
			got[endpoint]++
		}
		return got
	}
	synctest.Test(t, func(t *testing.T) { // alike: both are used
		n := newNetwork(map[string]way{gw1: slowly(20 * time.Millisecond), gw2: slowly(22 * time.Millisecond)})
		if got := share(t, newPool(n, gw1, gw2)); got[gw1] < 90 || got[gw2] < 90 {
			t.Errorf("shares %v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) { // one is far quicker
		n := newNetwork(map[string]way{gw1: slowly(10 * time.Millisecond), gw2: slowly(100 * time.Millisecond)})
		p := newPool(n, gw1, gw2)
		share(t, p)
		if got := share(t, p); got[gw1] != 300 {
			t.Errorf("shares %v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) { // three: none gets all, the slowest gets nothing
		n := newNetwork(map[string]way{gw1: slowly(20 * time.Millisecond), gw2: slowly(20 * time.Millisecond), gw3: slowly(100 * time.Millisecond)})
		p := newPool(n, gw1, gw2, gw3)
		share(t, p)
		if got := share(t, p); got[gw1] < 90 || got[gw2] < 90 || got[gw3] != 0 {
			t.Errorf("shares %v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) { // alike, but one has dials under way
		n := newNetwork(map[string]way{gw1: slowly(200 * time.Millisecond), gw2: slowly(200 * time.Millisecond)})
		p := newPool(n, gw1, gw2)
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() { dial(t, p) })
			synctest.Wait()
			n.mu.Lock()
			one, two := count(n.dialled, gw1), count(n.dialled, gw2)
			n.mu.Unlock()
			if one-two > 1 || two-one > 1 || one+two != i+1 {
				t.Errorf("shares %d and %d after %d dials", one, two, i+1)
			}
		}
		all.Wait()
	})
}

// The unhealthy one is not first for having been the quicker one.
func TestHealthComesBeforeLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: slowly(10 * time.Millisecond), gw2: slowly(200 * time.Millisecond)})
		p := newPool(n, gw1, gw2)
		for range 20 {
			dial(t, p)
		}
		n.took()
		for range 50 {
			p.Report(gw1, errors.New("down"))
			dial(t, p)
		}
		if dialled := n.took(); slices.Contains(dialled, gw1) {
			t.Error("the unhealthy one was tried")
		}
	})
}

func TestAvoidedComeLastAmongTheHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: answers})
		avoid := map[string]time.Time{gw1: time.Now().Add(time.Minute)}
		through := func(want string) {
			t.Helper()
			for range 50 {
				p := newPool(n, gw1, gw2, gw3)
				p.Report(gw3, errors.New("down"))
				c, won, err := dialAny(t.Context(), []tier{{pool: p}}, avoid)
				if err != nil || won.known.Endpoint != want {
					t.Fatalf("came out at %s: %v", won.known.Endpoint, err)
				}
				_ = c.Close()
			}
		}
		through(gw2)
		n.set(gw2, refuses)
		through(gw1)
		if dialled := n.took(); slices.Contains(dialled, gw3) {
			t.Error("the unhealthy one came before the avoided one")
		}
	})
}
