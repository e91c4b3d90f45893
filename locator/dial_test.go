package locator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

const (
	gw1 = "10.0.0.1:8443"
	gw2 = "10.0.0.2:8443"
	gw3 = "10.0.0.3:8443"
)

func TestRefusedByAllFailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{})
		p := newPool(n, gw1, gw2, gw3)
		began := time.Now()
		c, endpoint, err := p.Dial(t.Context())
		if !errors.Is(err, syscall.ECONNREFUSED) || c != nil || endpoint != "" {
			t.Fatalf("Dial = %v, %q, %v", c, endpoint, err)
		}
		for _, gw := range []string{gw1, gw2, gw3} {
			if !strings.Contains(err.Error(), gw) {
				t.Errorf("the error does not name %s: %v", gw, err)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("the error has several lines: %q", err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		if dialled := n.took(); len(dialled) != 3 {
			t.Errorf("dialled %v", dialled)
		}
		wantHealth(t, p, gw1+" down, "+gw2+" down, "+gw3+" down")
	})
}

func TestNoEndpoint(t *testing.T) {
	if _, _, err := newPool(newNetwork(nil)).Dial(t.Context()); !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("Dial: %v", err)
	}
}

func TestRefusedGoesToTheNextAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw2: answers})
		for range 20 {
			p := newPool(n, gw1, gw2, gw3)
			if endpoint, took := dial(t, p); endpoint != gw2 || took != 0 {
				t.Fatalf("came out at %s after %v", endpoint, took)
			}
		}
	})
}

// A dead gateway costs a quarter of a second until it is known, and nothing
// from then on.
func TestKnownDeadIsNotTriedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent, gw2: answers})
		p := newPool(n, gw1, gw2)
		for health(p) != gw1+" down, "+gw2+" up" {
			endpoint, took := dial(t, p)
			if endpoint != gw2 || took != 0 && took != hedgeAfter {
				t.Fatalf("came out at %s after %v", endpoint, took)
			}
		}
		n.took()
		for range 1000 {
			if endpoint, took := dial(t, p); endpoint != gw2 || took != 0 {
				t.Fatalf("came out at %s after %v", endpoint, took)
			}
		}
		if tried := count(n.took(), gw1); tried != 0 {
			t.Errorf("the dead one was tried %d times", tried)
		}
		if open := n.opened(); open != 0 {
			t.Errorf("%d connections are left", open)
		}
	})
}

// A verdict decides the order alone: a gateway that is wrongly taken for dead is
// used when it is the one that answers.
func TestHealthNeverMakesUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: refuses})
		p := newPool(n, gw1, gw2)
		p.Report(gw1, errors.New("died in use"))
		wantHealth(t, p, gw1+" down, "+gw2+" up")
		if endpoint, took := dial(t, p); endpoint != gw1 || took != 0 {
			t.Errorf("came out at %s after %v", endpoint, took)
		}
		wantHealth(t, p, gw1+" up, "+gw2+" down")
		p.Report(gw2, nil)
		p.Report("unknown:1", errors.New("not its own"))
		wantHealth(t, p, gw1+" up, "+gw2+" up")
		if s := p.Status()[0]; s.LastError != "died in use" {
			t.Errorf("last error %q", s.LastError)
		}
	})
}

// What drops everything in silence and comes back is used within a second.
func TestBlackoutOfTheOnlyOne(t *testing.T) {
	for _, away := range []time.Duration{100 * time.Millisecond, 3300 * time.Millisecond, 29999 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(map[string]way{gw1: silent})
			p := newPool(n, gw1)
			time.AfterFunc(away, func() { n.set(gw1, slowly(20*time.Millisecond)) })
			if _, took := dial(t, p); took < away || took > away+attemptTimeout+20*time.Millisecond {
				t.Errorf("away for %v, connected after %v", away, took)
			}
			wantHealth(t, p, gw1+" up")
		})
	}
}

// With more candidates the gap between two attempts at one of them does not grow.
func TestBlackoutOfSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{"10.0.0.1:1": silent, "10.0.0.2:1": silent, "10.0.0.3:1": silent, gw3: silent})
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{addrs: map[string][]string{"gw": {"10.0.0.1", "10.0.0.2", "10.0.0.3"}}}})
		p.Set(Configured("gw:1", gw3))
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, _, err := p.Dial(ctx); err == nil {
			t.Fatal("connected to nobody")
		}
		last := n.starts[0]
		for _, at := range n.starts {
			if gap := at.Sub(last); gap > attemptTimeout {
				t.Errorf("nothing was tried for %v", gap)
			}
			last = at
		}
		if left := time.Since(last); left > attemptTimeout {
			t.Errorf("nothing was tried in the last %v", left)
		}
	})
}

// A link that is down makes every dial fail without delay; they are neither
// given up nor made without end.
func TestCutOffIsTriedAgain(t *testing.T) {
	for _, addrs := range [][]string{{"10.0.0.1"}, {"10.0.0.1", "10.0.0.2", "2001:db8::1"}} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(map[string]way{"10.0.0.1:1": cutOff, "10.0.0.2:1": cutOff, "[2001:db8::1]:1": cutOff})
			p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{addrs: map[string][]string{"gw": addrs}}})
			p.Set(Configured("gw:1"))
			time.AfterFunc(5100*time.Millisecond, func() { n.set("10.0.0.1:1", answers) })
			if _, took := dial(t, p); took < 5100*time.Millisecond || took > 5100*time.Millisecond+leastRound {
				t.Errorf("connected after %v", took)
			}
			if dials := len(n.took()); dials > 22*len(addrs) {
				t.Errorf("%d dials", dials)
			}
		})
	}
}

// Refused is refused also on a host that cannot reach the name's other kind of
// address.
func TestRefusedBesideAnAddressOutOfReach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{"[2001:db8::1]:1": cutOff})
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{addrs: map[string][]string{"gw": {"10.0.0.1", "2001:db8::1"}}}})
		p.Set(Configured("gw:1"))
		began := time.Now()
		if _, _, err := p.Dial(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) || time.Since(began) != 0 {
			t.Errorf("Dial after %v: %v", time.Since(began), err)
		}
	})
}

func TestOneSilentAmongRefusingIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent, gw2: refuses})
		for range 20 {
			p := newPool(n, gw1, gw2)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+hedgeAfter/2) // amid a round
			began := time.Now()
			_, _, err := p.Dial(ctx)
			cancel()
			if took := time.Since(began); took != 10*time.Second+hedgeAfter/2 {
				t.Errorf("took %v", took)
			}
			if !errors.Is(err, syscall.ECONNREFUSED) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the error does not tell both: %v", err)
			}
		}
	})
}

// A long way is no fault: nothing is down because everything takes more than
// the time after which the next one is tried.
func TestAllFarAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: slowly(600 * time.Millisecond), gw2: slowly(620 * time.Millisecond)})
		p := newPool(n, gw1, gw2)
		for range 100 {
			if _, took := dial(t, p); took > 620*time.Millisecond {
				t.Fatalf("took %v", took)
			}
		}
		wantHealth(t, p, gw1+" up, "+gw2+" up")
		if open := n.opened(); open != 0 {
			t.Errorf("%d connections are left", open)
		}
	})
}

// Who connects while another has won is closed.
func TestLosersAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: slowly(hedgeAfter), gw2: answers})
		for range 50 {
			p := newPool(n, gw1, gw2)
			c, _, err := p.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if open := n.opened(); open != 1 {
				t.Fatalf("%d connections are open", open)
			}
			_ = c.Close()
		}
	})
}

func TestCallerThatGivesUpJudgesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent, gw2: silent})
		p := newPool(n, gw1, gw2)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(700*time.Millisecond, cancel)
		began := time.Now()
		if _, _, err := p.Dial(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Dial: %v", err)
		}
		if took := time.Since(began); took != 700*time.Millisecond {
			t.Errorf("took %v", took)
		}
		short, cancel := context.WithTimeout(t.Context(), hedgeAfter/2)
		defer cancel()
		if _, _, err := p.Dial(short); err == nil {
			t.Error("connected to nobody")
		}
		wantHealth(t, p, gw1+" up, "+gw2+" up")
	})
}

func TestFaultOfOurOwnJudgesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(newNetwork(map[string]way{gw1: outOfFDs, gw2: outOfFDs}), gw1, gw2)
		if _, _, err := p.Dial(t.Context()); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("Dial: %v", err)
		}
		wantHealth(t, p, gw1+" up, "+gw2+" up")
	})
}

// A name that cannot be looked up holds nobody else up, nor what was won.
func TestSlowNameBesideAnAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw2: answers})
		for range 20 {
			p := newPool(n, "unknown.example:8443", gw2)
			if endpoint, took := dial(t, p); endpoint != gw2 || took != 0 && took != hedgeAfter {
				t.Fatalf("came out at %s after %v", endpoint, took)
			}
		}
	})
}

func TestAllAnswersAreTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{"10.0.0.1:1": silent, "10.0.0.2:1": refuses, "10.0.0.3:1": answers, "10.0.0.9:1": answers})
		r := &names{addrs: map[string][]string{"gw": {"10.0.0.1", "10.0.0.2", "10.0.0.3"}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r})
		p.Set(Configured("gw:1"))
		for range 50 { // until each dead address has been tried once
			if _, took := dial(t, p); took != 0 && took != hedgeAfter {
				t.Fatalf("took %v", took)
			}
		}
		n.took()
		for range 1000 {
			if _, took := dial(t, p); took != 0 {
				t.Fatalf("took %v", took)
			}
		}
		if dialled := n.took(); len(dialled) != count(dialled, "10.0.0.3:1") {
			t.Error("addresses that are known to be dead were tried first")
		}
		if len(r.forgot) > 0 {
			t.Errorf("forgot %v although one worked", r.forgot)
		}
		// The name moves: the new address is used, and a dead one that is
		// named no more is no longer remembered.
		r.set("gw", "10.0.0.9")
		n.set("10.0.0.3:1", silent)
		if _, took := dial(t, p); took != 0 {
			t.Errorf("took %v", took)
		}
		if failed := p.endpoints[0].failed; len(failed) > 0 {
			t.Errorf("remembers %v", failed)
		}
	})
}

// When no address of a name works it is looked up again, and what it means then
// is used.
func TestNameThatMovedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{"10.0.0.1:1": silent, "10.0.0.2:1": answers})
		r := &names{addrs: map[string][]string{"gw": {"10.0.0.1"}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r})
		p.Set(Configured("gw:1"))
		time.AfterFunc(1500*time.Millisecond, func() { r.set("gw", "10.0.0.2") })
		if _, took := dial(t, p); took != 2*attemptTimeout {
			t.Errorf("took %v", took)
		}
		if !slices.Equal(r.forgot, []string{"gw:1", "gw:1"}) {
			t.Errorf("forgot %v", r.forgot)
		}
	})
}

func TestAddressesThatCannotBeDialled(t *testing.T) {
	for _, address := range []string{"10.0.0.1", "10.0.0.1:http", "10.0.0.1:70000", "empty:1"} {
		synctest.Test(t, func(t *testing.T) {
			p := NewPool(PoolOptions{Dial: newNetwork(nil).dial, Resolver: &names{addrs: map[string][]string{"empty": nil}}})
			p.Set(Configured(address))
			if _, _, err := p.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), address) {
				t.Errorf("Dial of %s: %v", address, err)
			}
		})
	}
}

func TestSetKeepsWhatStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw2: answers, gw3: answers})
		p := newPool(n, gw1, gw2)
		p.Report(gw1, errors.New("down"))
		since := p.Status()[0].Since
		time.Sleep(time.Second)
		p.Set(Configured(gw3, gw1, gw3))
		wantHealth(t, p, gw3+" up, "+gw1+" down")
		if got := p.Status()[1].Since; !got.Equal(since) {
			t.Errorf("since %v, want %v", got, since)
		}
		if endpoint, _ := dial(t, p); endpoint != gw3 {
			t.Errorf("came out at %s", endpoint)
		}
	})
}

// Endpoints may be taken away under a dial; it ends when none is left.
func TestSetUnderADial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent, gw2: answers})
		core, logs := observer.New(zap.InfoLevel)
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, Log: zap.New(core)})
		p.Set(Configured(gw1))
		time.AfterFunc(500*time.Millisecond, func() { p.Set(Configured(gw2)) })
		if endpoint, took := dial(t, p); endpoint != gw2 || took != attemptTimeout {
			t.Errorf("came out at %s after %v", endpoint, took)
		}
		if logs.Len() > 0 {
			t.Errorf("logged about what was taken away: %v", logs.All())
		}
		n.set(gw2, silent)
		time.AfterFunc(1500*time.Millisecond, func() { p.Set(nil) })
		if _, _, err := p.Dial(t.Context()); !errors.Is(err, ErrNoEndpoint) {
			t.Errorf("Dial: %v", err)
		}
	})
}

func TestManyDialsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: silent, gw2: slowly(10 * time.Millisecond), gw3: refuses})
		p := newPool(n, gw1, gw2, gw3)
		ended := make(chan error)
		for range 200 {
			go func() {
				c, endpoint, err := p.Dial(t.Context())
				switch {
				case err != nil:
				case endpoint != gw2:
					err = fmt.Errorf("came out at %s", endpoint)
				default:
					err = c.Close()
				}
				ended <- err
			}()
		}
		for range 200 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if open := n.opened(); open != 0 {
			t.Errorf("%d connections are left", open)
		}
		for _, e := range p.endpoints {
			if e.dialing != 0 {
				t.Errorf("%s has %d dials under way", e.address, e.dialing)
			}
		}
	})
}
