package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// Three servers over TCP of the loopback interface, on the clock of the wall: how
// long an election takes, and that raft's own words come out where ours do.
func TestOverTCP(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	stores, listeners := overTCP(t, zap.New(core))
	first := await(t, stores...)
	for i := range 100 {
		for {
			_, err := stores[first].Register(t.Context(), numbered(i))
			if err == nil {
				break
			}
			if _, ok := errors.AsType[*NotLeaderError](err); !ok {
				t.Fatal(err)
			}
			first = await(t, stores...) // a machine that was held up has them vote again
		}
	}
	// It is cut off, as if its host had gone.
	began := time.Now()
	_ = listeners[first].Close()
	stores[first].current().layer.cut()
	rest := append(append([]*Store(nil), stores[:first]...), stores[first+1:]...)
	next := await(t, rest...)
	t.Logf("the next leader took %v", time.Since(began))
	for i := range 100 {
		if _, ok := find(rest[next].State(), numbered(i)); !ok {
			t.Errorf("registration %d is lost", i)
		}
	}
	if logs.FilterMessageSnippet("store is led by this server").Len() < 2 {
		t.Errorf("the log does not tell of leaders: %v", logs.All())
	}
	for _, l := range logs.All() {
		if l.Level > zapcore.WarnLevel {
			t.Errorf("logged as an error: %v", l)
		}
	}
}

// overTCP runs three stores until the test ends.
func overTCP(t *testing.T, log *zap.Logger) ([]*Store, []net.Listener) {
	t.Helper()
	stores, byAddress := make([]*Store, 3), make(map[string]*Store)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var listeners []net.Listener
	var join []string
	for range stores {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners, join = append(listeners, ln), append(join, ln.Addr().String())
	}
	t.Cleanup(func() {
		cancel()
		for _, ln := range listeners {
			_ = ln.Close()
		}
		wg.Wait()
	})
	for i, ln := range listeners {
		s, err := Open(Options{
			Datacenter: "dc1", Node: fmt.Sprintf("n%d", i), Address: join[i], DataDir: t.TempDir(), Expect: 3,
			Neighbours: direct(byAddress), Join: func() []string { return join }, Log: log,
			Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", address)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		stores[i], byAddress[join[i]] = s, s
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { s.ServeConn(ctx, c) })
			}
		})
	}
	for _, s := range stores {
		wg.Go(func() { _ = s.Run(ctx) })
	}
	return stores, listeners
}

// await waits for one to lead.
func await(t *testing.T, stores ...*Store) int {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 3000 {
		for i, s := range stores {
			if _, _, err := s.leading(); err == nil && s.State().Store() != "" {
				return i
			}
		}
		<-tick.C
	}
	t.Fatal("nobody leads after a minute")
	return 0
}

// direct are neighbours that are asked by a call.
type direct map[string]*Store

func (d direct) Greet(_ context.Context, address string) (Greeting, error) {
	return d[address].Greeting(), nil
}

func (d direct) Promise(_ context.Context, address string, p Proposal) error {
	return d[address].Promise(p)
}
