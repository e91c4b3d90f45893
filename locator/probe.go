package locator

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	probeEvery     = 10 * time.Second
	probeDownEvery = time.Second
	// probeTimeout has room for a SYN that is lost and sent again after a
	// second: one lost packet makes nothing unhealthy.
	probeTimeout = 2 * time.Second
	maxProbes    = 16 // connecting at a time
	// inUse is how long after a dial an OnDemand pool is probed like others.
	inUse = 10 * time.Minute
)

// Run probes the endpoints until ctx ends, and returns nil. Afterwards their
// health is not shown any more.
func (p *Pool) Run(ctx context.Context) error {
	defer p.end()
	if p.o.NoProbe {
		<-ctx.Done()
		return nil
	}
	var probes sync.WaitGroup
	defer probes.Wait()
	slots := make(chan struct{}, maxProbes)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-p.wake:
		case <-ctx.Done():
			return nil
		}
		due, wait := p.due()
		for _, e := range due {
			probes.Go(func() { p.probe(ctx, e, slots) })
		}
		timer.Reset(wait)
	}
}

// due claims the endpoints whose probe's time has come, and tells how long it is
// until the next one's.
func (p *Pool) due() (due []*endpoint, wait time.Duration) {
	now := time.Now()
	wait = probeEvery
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := p.o.OnDemand && (p.used.IsZero() || now.Sub(p.used) >= inUse)
	for _, e := range p.endpoints {
		if e.nextProbe.IsZero() { // spread the first ones
			e.nextProbe = now.Add(upTo(probeEvery))
		}
		if e.probing || e.healthy && idle { // the end of the one wakes Run, a dial ends the other
			continue
		}
		if now.Before(e.nextProbe) {
			wait = min(wait, e.nextProbe.Sub(now))
			continue
		}
		every := probeEvery
		if !e.healthy && !idle {
			every = probeDownEvery
		}
		e.nextProbe = now.Add(jitter(every))
		e.probing = true
		due = append(due, e)
	}
	return due, wait
}

// jitter is d, give or take a tenth, so that pools do not probe in step.
func jitter(d time.Duration) time.Duration { return d*9/10 + upTo(d/5) }

func upTo(d time.Duration) time.Duration {
	return rand.N(d) //nolint:gosec // spreads load: nothing depends on it being secret
}

// rouse lets Run look at what is due.
func (p *Pool) rouse() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// probe connects to each address of an endpoint and closes the connections again
// without having sent anything. One that is taken is enough.
func (p *Pool) probe(ctx context.Context, e *endpoint, slots chan struct{}) {
	err := p.probeAddresses(ctx, e, slots)
	if ctx.Err() == nil && !isOurs(err) {
		p.o.Metrics.probed(err == nil)
		p.note(e, err)
	}
	p.mu.Lock()
	e.probing = false
	p.mu.Unlock()
	p.rouse()
}

func (p *Pool) probeAddresses(ctx context.Context, e *endpoint, slots chan struct{}) error {
	addrs, err := p.addresses(ctx, e, probeTimeout)
	if err != nil {
		return err
	}
	errs := make([]error, len(addrs))
	var all sync.WaitGroup
	for i, a := range addrs {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			errs[i] = ctx.Err()
			continue
		}
		all.Go(func() {
			defer func() { <-slots }()
			began := time.Now()
			c, err := p.connect(ctx, e, a, probeTimeout)
			if err == nil {
				_ = c.Close()
			}
			if errs[i] = err; ctx.Err() == nil {
				p.learn(e, a, time.Since(began), err)
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err == nil {
			return nil
		}
	}
	p.forget(e)
	return joined(errs)
}
