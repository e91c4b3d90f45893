package locator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// runPool runs a pool until the returned function is called, which returns when
// it has ended.
func runPool(t *testing.T, p *Pool) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- p.Run(ctx) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestProbesOfHealthyEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers, gw2: slowly(30 * time.Millisecond)})
		m := NewMetrics(nil)
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, Metrics: m})
		p.Set(Configured(gw1, gw2))
		defer runPool(t, p)()
		time.Sleep(1000 * time.Second)
		n.mu.Lock()
		starts, dialled := n.starts, n.dialled
		n.mu.Unlock()
		last := make(map[string]time.Time)
		gaps := make(map[time.Duration]bool)
		for i, at := range starts {
			if before, ok := last[dialled[i]]; ok {
				gap := at.Sub(before)
				gaps[gap] = true
				if gap < 9*time.Second || gap > 11*time.Second {
					t.Errorf("a probe of %s came %v after the one before", dialled[i], gap)
				}
			}
			last[dialled[i]] = at
		}
		for _, gw := range []string{gw1, gw2} {
			if probes := count(dialled, gw); probes < 90 || probes > 112 {
				t.Errorf("%d probes of %s in 1000 s", probes, gw)
			}
		}
		if len(gaps) < 100 {
			t.Errorf("only %d different gaps: the probes have no jitter", len(gaps))
		}
		if open := n.opened(); open != 0 || n.written != 0 {
			t.Errorf("%d probes are open, %d bytes were sent", open, n.written)
		}
		if ok := testutil.ToFloat64(m.probes.WithLabelValues("ok")); ok != float64(len(dialled)) {
			t.Errorf("%v probes are counted, %d were made", ok, len(dialled))
		}
		wantHealth(t, p, gw1+" up, "+gw2+" up")
	})
}

// A gateway that dies is noticed without a dial, and so is its return.
func TestProbesNoticeDeathAndReturn(t *testing.T) {
	for name, dead := range map[string]way{"refuses": refuses, "silent": silent, "cut off": cutOff} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(map[string]way{gw1: answers, gw2: answers})
				core, logs := observer.New(zap.InfoLevel)
				p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, Log: zap.New(core)})
				p.Set(Configured(gw1, gw2))
				defer runPool(t, p)()
				time.Sleep(25 * time.Second)
				n.set(gw1, dead)
				time.Sleep(11*time.Second + probeTimeout)
				wantHealth(t, p, gw1+" down, "+gw2+" up")
				if s := p.Status()[0]; s.LastError == "" || time.Since(s.Since) > 11*time.Second+probeTimeout {
					t.Errorf("status %+v", s)
				}
				n.took()
				time.Sleep(20 * time.Second)
				if probes := count(n.took(), gw1); dead != silent && (probes < 18 || probes > 23) {
					t.Errorf("%d probes in 20 s while it was down", probes)
				}
				n.set(gw1, answers)
				time.Sleep(probeTimeout + 200*time.Millisecond)
				wantHealth(t, p, gw1+" up, "+gw2+" up")
				if got := logs.Len(); got != 2 || logs.All()[0].Level != zap.WarnLevel || logs.All()[1].Level != zap.InfoLevel {
					t.Errorf("logged %v", logs.All())
				}
			})
		})
	}
}

// What a dial found dead is probed a second later, not when its turn would come.
func TestProbesFollowDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: answers})
		p := newPool(n, gw1)
		defer runPool(t, p)()
		time.Sleep(15 * time.Second)
		for range 20 {
			p.Report(gw1, errors.New("died in use"))
			wantHealth(t, p, gw1+" down")
			time.Sleep(1100 * time.Millisecond)
			wantHealth(t, p, gw1+" up")
		}
	})
}

// A probe whose first SYN is lost is answered after the second one.
func TestOneLostPacketMakesNothingUnhealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		p := NewPool(PoolOptions{
			Dial: newNetwork(map[string]way{gw1: slowly(1100 * time.Millisecond)}).dial, Resolver: &names{}, Log: zap.New(core),
		})
		p.Set(Configured(gw1))
		defer runPool(t, p)()
		time.Sleep(time.Minute)
		if logs.Len() > 0 {
			t.Errorf("logged %v", logs.All())
		}
	})
}

// An endpoint that was slow once is not left out for good: probes tell that it
// is quick again.
func TestProbesTellLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{gw1: slowly(200 * time.Millisecond), gw2: slowly(10 * time.Millisecond)})
		p := newPool(n, gw1, gw2)
		defer runPool(t, p)()
		for range 50 {
			dial(t, p)
		}
		n.set(gw1, slowly(10*time.Millisecond))
		n.took()
		for range 50 {
			dial(t, p)
		}
		if tried := count(n.took(), gw1); tried > 2 {
			t.Errorf("the slow one was chosen %d times", tried)
		}
		time.Sleep(3 * time.Minute)
		got := 0
		for range 100 {
			if endpoint, _ := dial(t, p); endpoint == gw1 {
				got++
			}
		}
		if got < 20 {
			t.Errorf("was chosen %d times of 100 after it had become quick", got)
		}
	})
}

// A name is healthy as long as one of its addresses is, and probes tell which.
func TestProbesOfAName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(map[string]way{"10.0.0.1:1": silent, "10.0.0.2:1": answers})
		r := &names{addrs: map[string][]string{"gw": {"10.0.0.1", "10.0.0.2"}}}
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: r})
		p.Set(Configured("gw:1"))
		defer runPool(t, p)()
		time.Sleep(15 * time.Second)
		wantHealth(t, p, "gw:1 up")
		for range 100 {
			if _, took := dial(t, p); took != 0 {
				t.Fatalf("an address known to be dead came first: %v", took)
			}
		}
		n.set("10.0.0.1:1", answers)
		time.Sleep(15 * time.Second)
		n.took()
		for range 200 {
			dial(t, p)
		}
		if first := count(n.took(), "10.0.0.1:1"); first < 50 {
			t.Errorf("an address that is back was used %d times of 200", first)
		}
		r.set("gw")
		time.Sleep(15 * time.Second)
		wantHealth(t, p, "gw:1 down")
	})
}

func TestProbesAreBoundedAndEndWithRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(make(map[string]way))
		var endpoints []string
		for i := range 200 {
			endpoints = append(endpoints, fmt.Sprintf("10.0.1.%d:1", i))
			n.set(endpoints[i], silent)
		}
		p := newPool(n, endpoints...)
		stop := runPool(t, p)
		time.Sleep(12500 * time.Millisecond)
		began := time.Now()
		stop()
		if took := time.Since(began); took != 0 {
			t.Errorf("ending took %v", took)
		}
		if n.busiest != maxProbes {
			t.Errorf("%d probes at a time, want %d", n.busiest, maxProbes)
		}
	})
}

func TestProbesFollowSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(make(map[string]way))
		p := newPool(n)
		defer runPool(t, p)()
		time.Sleep(30 * time.Second)
		for range 10 {
			for _, gw := range []string{gw1, gw2} { // each is as good as new
				p.Set(Configured(gw))
				n.took()
				time.Sleep(probeEvery)
				if dialled := n.took(); len(dialled) == 0 || count(dialled, gw) != len(dialled) {
					t.Errorf("probed %v", dialled)
				}
				wantHealth(t, p, gw+" down")
			}
		}
	})
}

func TestNoProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(make(map[string]way))
		reg := prometheus.NewRegistry()
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, NoProbe: true, Metrics: NewMetrics(reg)})
		p.Set(Configured(gw1))
		stop := runPool(t, p)
		time.Sleep(time.Minute)
		p.Report(gw1, errors.New("down"))
		time.Sleep(time.Minute)
		if dialled := n.took(); len(dialled) > 0 {
			t.Errorf("probed %v", dialled)
		}
		wantGauge(t, reg, "")
		stop()
	})
}

// wantGauge compares what is shown of health: "address value" lines.
func wantGauge(t *testing.T, reg *prometheus.Registry, want string) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if f.GetName() != "culvert_locator_gateway_healthy" {
			continue
		}
		for _, m := range f.GetMetric() {
			got = append(got, fmt.Sprintf("%s %v", m.GetLabel()[0].GetValue(), m.GetGauge().GetValue()))
		}
	}
	if got := strings.Join(got, ", "); got != want {
		t.Errorf("health shown: %q, want %q", got, want)
	}
}

// An address that several pools have is shown as long as one has it, and as
// healthy if all find it so.
func TestHealthShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		m := NewMetrics(reg)
		n := newNetwork(map[string]way{gw1: answers, gw2: answers})
		one := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, Metrics: m})
		two := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, Metrics: m})
		one.Set(Configured(gw1, gw2))
		two.Set(Configured(gw1))
		wantGauge(t, reg, gw1+" 1, "+gw2+" 1")
		one.Report(gw1, errors.New("down"))
		wantGauge(t, reg, gw1+" 0, "+gw2+" 1")
		one.Set(Configured(gw2))
		wantGauge(t, reg, gw1+" 1, "+gw2+" 1")
		two.Set(nil)
		wantGauge(t, reg, gw2+" 1")
		runPool(t, one)() // runs and ends
		wantGauge(t, reg, "")
		one.Report(gw2, errors.New("down"))
		one.Set(Configured(gw1))
		wantGauge(t, reg, "")
	})
}

// Of very many pools, what was never tried is not said to be healthy.
func TestOnDemandIsShownOnceTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		n := newNetwork(map[string]way{gw1: answers})
		p := NewPool(PoolOptions{Dial: n.dial, Resolver: &names{}, OnDemand: true, Metrics: NewMetrics(reg)})
		p.Set(Configured(gw1, gw2))
		wantGauge(t, reg, "")
		p.Report(gw2, errors.New("down"))
		wantGauge(t, reg, gw2+" 0")
		if dial(t, p); p.Status()[0].Tried != true {
			t.Errorf("status %+v", p.Status())
		}
		wantGauge(t, reg, gw1+" 1, "+gw2+" 0")
		p.Set(nil)
		wantGauge(t, reg, "")
	})
}

// The series of the closed sets are there from the start.
func TestMetricsAtZero(t *testing.T) {
	reg := prometheus.NewRegistry()
	NewMetrics(reg)
	for name, want := range map[string]int{"culvert_locator_dials_total": 8, "culvert_locator_probes_total": 2, "culvert_locator_gateway_healthy": 0} {
		if got, err := testutil.GatherAndCount(reg, name); err != nil || got != want {
			t.Errorf("%s has %d series (%v), want %d", name, got, err, want)
		}
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
}
