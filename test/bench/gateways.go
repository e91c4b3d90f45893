package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

// The sizes of the loads.
const (
	gatewayBytes    = 2 << 30
	gatewayIdle     = 500 // connections held meanwhile
	gatewayShort    = 4000
	gatewayShortTLS = 1000
	parallel        = 8
	idleConns       = 1000
	warmUp          = 50 // connections before anything is measured

	// settle is how long connections are left alone before memory is read.
	settle = time.Second
)

const gib = 1 << 30

// behind are the servers behind gateways, one for each proxy: the ports between the
// two are limited.
type behind struct{ opaque, secure *local }

func newBehind(b *bench) (behind, error) {
	one, err := newLocal(afterHello)
	if err != nil {
		return behind{}, err
	}
	two, err := newLocal(secured(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{b.server}}))
	if err != nil {
		one.close()
		return behind{}, err
	}
	return behind{one, two}, nil
}

func (s behind) settings() settings {
	return settings{
		OpaqueName: opaqueName, SecureName: secureName,
		Opaque: s.opaque.address(), Secure: s.secure.address(),
	}
}

func (s behind) close() {
	s.opaque.close()
	s.secure.close()
}

// A measureOf measures one round of a proxy's: one value a column.
type measureOf = func(ctx context.Context, p *proxy) ([]float64, error)

// A fleet is the proxies of a topic, which run from its beginning to its end.
type fleet struct{ end []func() error }

// close stops them.
func (f *fleet) close() error {
	var errs []error
	for _, end := range f.end {
		errs = append(errs, end())
	}
	return errors.Join(errs...)
}

// add starts a proxy and makes a row of it: one that says why, if it does not
// start.
func (f *fleet) add(ctx context.Context, b *bench, k kind, s settings, measure measureOf) *row {
	p, err := b.start(ctx, k, s)
	if err != nil {
		return &row{name: k.name, err: err}
	}
	f.end = append(f.end, p.stop)
	return &row{name: k.name, measure: func(ctx context.Context) ([]float64, error) { return measure(ctx, p) }}
}

// gatewayFleet starts all gateways.
func gatewayFleet(ctx context.Context, b *bench, measure measureOf) (*fleet, []*row, error) {
	f := &fleet{}
	var rows []*row
	for _, k := range gatewayKinds(b.culvert) {
		servers, err := newBehind(b)
		if err != nil {
			return nil, nil, errors.Join(err, f.close())
		}
		rows = append(rows, f.add(ctx, b, k, servers.settings(), measure))
		f.end = append(f.end, func() error { servers.close(); return nil })
	}
	return f, rows, nil
}

func gatewayBulkTopic(ctx context.Context, b *bench) (*topic, error) {
	hello, err := newHello()
	if err != nil {
		return nil, err
	}
	held := make(map[*proxy]func())
	f, rows, err := gatewayFleet(ctx, b, func(ctx context.Context, p *proxy) ([]float64, error) {
		open := opaque(p.address, hello)
		if held[p] == nil {
			if held[p], err = hold(ctx, open, gatewayIdle); err != nil {
				return nil, fmt.Errorf("hold idle connections: %w", err)
			}
			if err := bulk(ctx, open, gatewayBytes/4); err != nil {
				return nil, err
			}
		}
		cpu, took, err := p.used(func() error { return bulk(ctx, open, gatewayBytes) })
		return []float64{cpu.Seconds() * gib / gatewayBytes, took.Seconds() * gib / gatewayBytes}, err
	})
	if err != nil {
		return nil, err
	}
	return &topic{
		title:   fmt.Sprintf("SNI passthrough, %d connections, %d GiB, %d idle connections held", bulkConns, gatewayBytes/gib, gatewayIdle),
		columns: []string{"CPU s/GiB", "s/GiB"}, rows: rows,
		bounds: []bound{
			{row: rowCulvert, beside: rowHAProxy, most: 0.65},
			{row: rowCulvert, beside: rowNginx, most: 0.65},
			{row: rowCulvert, beside: rowSplicing, most: 1.15},
		},
		known: map[string]float64{rowHAProxy: 0.565, rowNginx: 0.530},
		close: func() error {
			for _, drop := range held {
				if drop != nil {
					drop()
				}
			}
			return f.close()
		},
	}, nil
}

func gatewayShortTopic(ctx context.Context, b *bench) (*topic, error) {
	hello, err := newHello()
	if err != nil {
		return nil, err
	}
	t, err := gatewayConnections(ctx, b, gatewayShort, func(p *proxy) client { return opaque(p.address, hello) })
	if err != nil {
		return nil, err
	}
	t.title = fmt.Sprintf("SNI passthrough, %d connections, %d at a time: hello, a byte each way, close", gatewayShort, parallel)
	t.bounds = []bound{{row: rowCulvert, beside: rowHAProxy, most: 1.2, aim: 1.0}}
	t.known = map[string]float64{rowHAProxy: 85, rowNginx: 67.5}
	return t, nil
}

func gatewayShortTLSTopic(ctx context.Context, b *bench) (*topic, error) {
	config := b.peerConfig()
	config.ServerName, config.InsecureSkipVerify = secureName, true // the server's certificate names one server, whoever stands for it
	t, err := gatewayConnections(ctx, b, gatewayShortTLS, func(p *proxy) client { return secure(p.address, config) })
	if err != nil {
		return nil, err
	}
	t.title = fmt.Sprintf("SNI passthrough, %d connections, %d at a time: a whole TLS 1.3 handshake through it, a byte each way, close", gatewayShortTLS, parallel)
	t.bounds = []bound{{row: rowCulvert, beside: rowHAProxy, most: 1.2, aim: 1.0}}
	return t, nil
}

func gatewayConnections(ctx context.Context, b *bench, conns int, open func(p *proxy) client) (*topic, error) {
	warm := make(map[*proxy]bool)
	f, rows, err := gatewayFleet(ctx, b, func(ctx context.Context, p *proxy) ([]float64, error) {
		return p.perConnection(ctx, open(p), conns, warm)
	})
	if err != nil {
		return nil, err
	}
	return &topic{columns: []string{"CPU µs", "connections/s"}, rows: rows, close: f.close}, nil
}

// perConnection is what short connections cost.
func (p *proxy) perConnection(ctx context.Context, open client, conns int, warm map[*proxy]bool) ([]float64, error) {
	if !warm[p] {
		warm[p] = true
		if err := short(ctx, open, conns/4, parallel); err != nil {
			return nil, err
		}
	}
	cpu, took, err := p.used(func() error { return short(ctx, open, conns, parallel) })
	return []float64{float64(cpu.Microseconds()) / float64(conns), float64(conns) / took.Seconds()}, err
}

func gatewayIdleTopic(_ context.Context, b *bench) (*topic, error) {
	hello, err := newHello()
	if err != nil {
		return nil, err
	}
	t := idleTopic()
	t.title = fmt.Sprintf("SNI passthrough, %d idle connections, for one of them", idleConns)
	for _, k := range gatewayKinds(b.culvert) {
		t.rows = append(t.rows, &row{name: k.name, measure: func(ctx context.Context) ([]float64, error) {
			servers, err := newBehind(b)
			if err != nil {
				return nil, err
			}
			defer servers.close()
			return b.idle(ctx, k, servers.settings(), func(p *proxy) client { return opaque(p.address, hello) })
		}})
	}
	t.rows = append(t.rows, &row{name: rowNone, measure: func(ctx context.Context) ([]float64, error) {
		servers, err := newBehind(b)
		if err != nil {
			return nil, err
		}
		defer servers.close()
		return idleWithout(ctx, opaque(servers.opaque.address(), hello))
	}})
	t.bounds = []bound{{row: rowCulvert, column: 0, most: 8, aim: 6}, {row: rowCulvert, column: 1, most: 2}}
	t.known = map[string]float64{rowHAProxy: 3.0, rowNginx: 15.7}
	return t, nil
}
