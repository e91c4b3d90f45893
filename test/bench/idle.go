package main

import (
	"context"
	"errors"
	"time"
)

// rowNone is the same connections without a proxy: what the kernel's memory is
// for this program's own ends.
const rowNone = "(none: the two ends alone)"

func idleTopic() *topic {
	return &topic{memory: true, columns: []string{"PSS KiB", "descriptors", "slab KiB, both ends' too"}, close: func() error { return nil }}
}

// An inventory is what a proxy holds.
type inventory struct{ pss, descriptors, slab float64 }

func (p *proxy) inventory() (i inventory, err error) {
	var errs [3]error
	i.pss, errs[0] = p.pss()
	i.descriptors, errs[1] = p.descriptors()
	i.slab, errs[2] = slab()
	return i, errors.Join(errs[:]...)
}

// idle starts a proxy, gives it idle connections and tells what it holds for each.
// It begins anew each time: what a proxy has held before it may not give back.
func (b *bench) idle(ctx context.Context, k kind, s settings, open func(p *proxy) client) (values []float64, err error) {
	p, err := b.start(ctx, k, s)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	if err := short(ctx, open(p), warmUp, parallel); err != nil {
		return nil, errors.Join(err, p.check())
	}
	time.Sleep(settle)
	before, err := p.inventory()
	if err != nil {
		return nil, err
	}
	drop, err := hold(ctx, open(p), idleConns)
	if err != nil {
		return nil, errors.Join(err, p.check())
	}
	defer drop()
	time.Sleep(settle)
	after, err := p.inventory()
	if err != nil {
		return nil, err
	}
	return []float64{
		(after.pss - before.pss) / idleConns, (after.descriptors - before.descriptors) / idleConns, (after.slab - before.slab) / idleConns,
	}, nil
}

// idleWithout is idle without a proxy.
func idleWithout(ctx context.Context, open client) ([]float64, error) {
	time.Sleep(settle)
	before, err := slab()
	if err != nil {
		return nil, err
	}
	drop, err := hold(ctx, open, idleConns)
	if err != nil {
		return nil, err
	}
	defer drop()
	time.Sleep(settle)
	after, err := slab()
	return []float64{0, 0, (after - before) / idleConns}, err
}
