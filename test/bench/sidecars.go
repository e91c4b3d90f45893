package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
)

const (
	sidecarBytes      = 1 << 30
	sidecarHandshakes = 600
)

// Rows of the sidecars' tables that say more than the program's name.
const (
	resumed        = ", resumed"
	rowPostQuantum = "Culvert, X25519MLKEM768"
)

// sidecarRows starts a sidecar, or what stands for one, and makes rows of it.
func (f *fleet) sidecarRows(ctx context.Context, b *bench, k kind, rows ...*row) []*row {
	failed := func(err error) []*row {
		for _, r := range rows {
			r.err = err
		}
		return rows
	}
	server, err := newLocal(plain)
	if err != nil {
		return failed(err)
	}
	f.end = append(f.end, func() error { server.close(); return nil })
	p, err := b.start(ctx, k, sidecarSettings(server))
	if err != nil {
		return failed(err)
	}
	f.end = append(f.end, p.stop)
	for _, r := range rows {
		measure := r.of
		r.measure = func(ctx context.Context) ([]float64, error) { return measure(ctx, p) }
	}
	return rows
}

func sidecarSettings(server *local) settings {
	return settings{Local: server.address(), Port: 7946}
}

// sidecarHandshakesTopic is what connections cost, by how they begin.
func sidecarHandshakesTopic(ctx context.Context, b *bench) (*topic, error) {
	f := &fleet{}
	t := &topic{
		title: fmt.Sprintf("mutual TLS 1.3 terminated, %d connections, %d at a time: handshake (X25519), a byte each way, close",
			sidecarHandshakes, parallel),
		columns: []string{"CPU µs", "connections/s"},
		bounds: []bound{
			{row: rowCulvert, beside: rowHAProxy, most: 0.5, aim: 0.42}, {row: rowCulvert + resumed, beside: rowCulvert, most: 0.4},
		},
		known: map[string]float64{rowHAProxy: 1225, rowNginx: 980, rowStunnel: 1960},
		close: f.close,
	}
	for _, k := range sidecarKinds(b.culvert) {
		rows := []*row{
			{name: k.name, of: handshakes(b.peerConfig())},
			{name: k.name + resumed, of: resumptions(b.peerConfig())},
		}
		if k.name == rowCulvert {
			rows = append(rows, &row{name: rowPostQuantum, of: handshakes(b.peerConfig(tls.X25519MLKEM768))})
		}
		t.rows = append(t.rows, f.sidecarRows(ctx, b, k, rows...)...)
	}
	return t, nil
}

// handshakes measures full ones.
func handshakes(config *tls.Config) func(context.Context, *proxy) ([]float64, error) {
	warm := make(map[*proxy]bool)
	return func(ctx context.Context, p *proxy) ([]float64, error) {
		return p.perConnection(ctx, secure(p.address, config), sidecarHandshakes, warm)
	}
}

// resumptions measures resumed ones, and fails if they are not.
func resumptions(config *tls.Config) func(context.Context, *proxy) ([]float64, error) {
	warm := make(map[*proxy]bool)
	return func(ctx context.Context, p *proxy) ([]float64, error) {
		config := config.Clone()
		config.ClientSessionCache = tls.NewLRUClientSessionCache(0)
		if err := exchange(ctx, secure(p.address, config)); err != nil { // which brings a ticket
			return nil, err
		}
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			if !cs.DidResume {
				return errors.New("the session was not resumed")
			}
			return nil
		}
		return p.perConnection(ctx, secure(p.address, config), sidecarHandshakes, warm)
	}
}

func sidecarBulkTopic(ctx context.Context, b *bench) (*topic, error) {
	f := &fleet{}
	t := &topic{
		title:   fmt.Sprintf("mutual TLS 1.3 terminated (AES-128-GCM), %d connections, %d GiB", bulkConns, sidecarBytes/gib),
		columns: []string{"CPU s/GiB", "s/GiB"},
		bounds:  []bound{{row: rowCulvert, beside: rowHAProxy, most: 0.85, aim: 0.75}},
		known:   map[string]float64{rowHAProxy: 0.860, rowNginx: 0.845, rowStunnel: 0.890},
		close:   f.close,
	}
	warm := make(map[*proxy]bool)
	for _, k := range sidecarKinds(b.culvert) {
		t.rows = append(t.rows, f.sidecarRows(ctx, b, k, &row{name: k.name, of: func(ctx context.Context, p *proxy) ([]float64, error) {
			open := secure(p.address, b.peerConfig())
			if !warm[p] {
				warm[p] = true
				if err := bulk(ctx, open, sidecarBytes/4); err != nil {
					return nil, err
				}
			}
			cpu, took, err := p.used(func() error { return bulk(ctx, open, sidecarBytes) })
			return []float64{cpu.Seconds() * gib / sidecarBytes, took.Seconds() * gib / sidecarBytes}, err
		}})...)
	}
	return t, nil
}

func sidecarIdleTopic(_ context.Context, b *bench) (*topic, error) {
	t := idleTopic()
	t.title = fmt.Sprintf("mutual TLS 1.3 terminated, %d idle connections, for one of them", idleConns)
	for _, k := range sidecarKinds(b.culvert) {
		t.rows = append(t.rows, &row{name: k.name, measure: func(ctx context.Context) ([]float64, error) {
			server, err := newLocal(plain)
			if err != nil {
				return nil, err
			}
			defer server.close()
			return b.idle(ctx, k, sidecarSettings(server), func(p *proxy) client { return secure(p.address, b.peerConfig()) })
		}})
	}
	t.bounds = []bound{{row: rowCulvert, column: 0, most: 30}}
	t.known = map[string]float64{rowHAProxy: 21.5, rowNginx: 34.2, rowStunnel: 85}
	return t, nil
}
