// Package scale measures a store of many datacenters, and how long one change
// takes to all who follow it. See docs/scale.md.
package scale

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"culvert/alpn"
	"culvert/certs"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/h2"
	"culvert/internal/testpki"
	"culvert/sniff"
)

const (
	datacenters = 300
	servers     = 10 // of each
	gateways    = 2  // of each
	followers   = 3000
	replicas    = 100 // of the followers, in full
)

// fill registers everything that there is.
func fill(b *testing.B, s *store.Store) {
	b.Helper()
	var wg sync.WaitGroup
	work := make(chan state.Registration)
	for range 64 {
		wg.Go(func() {
			for r := range work {
				register(b, s, r)
			}
		})
	}
	for d := range datacenters {
		for i := range servers {
			work <- registration(d, i, "0.1.0")
		}
		for i := range gateways {
			work <- state.Registration{Datacenter: fmt.Sprintf("dc%d", d+1), Gateway: &state.Gateway{
				Name: fmt.Sprintf("gateway-%d", i+1), Address: fmt.Sprintf("10.0.0.%d:8443", i+1),
				WANAddress: fmt.Sprintf("gw%d.dc%d.example:8443", i+1, d+1), Version: "0.1.0", Health: state.Passing,
				Process: state.Process{Instance: "0123456789abcdef", Start: "0123456789abcdef"},
			}}
		}
	}
	close(work)
	wg.Wait()
}

// register registers once the store takes it: who leads it is known a moment
// before.
func register(b *testing.B, s *store.Store, r state.Registration) {
	b.Helper()
	for {
		_, err := s.Register(b.Context(), r)
		if err == nil {
			return
		}
		if _, early := errors.AsType[*store.NotLeaderError](err); !early || b.Context().Err() != nil {
			b.Errorf("register %s: %v", r.Key(), err)
			return
		}
		<-time.After(10 * time.Millisecond)
	}
}

func registration(d, i int, version string) state.Registration {
	return state.Registration{Datacenter: fmt.Sprintf("dc%d", d+1), Server: &state.Server{
		Node: fmt.Sprintf("server-%d", i+1), Advertise: netip.AddrFrom4([4]byte{10, byte(d >> 8), byte(d), byte(i + 1)}),
		Address: fmt.Sprintf("10.0.0.%d:8443", i+11), Version: version, Health: state.Passing,
		Services: []state.Service{
			{Name: "gossip-packet", Kind: "packet", Port: 8302},
			{Name: "gossip-stream", Kind: "stream", Port: 8302},
			{Name: "rpc", Kind: "stream", Port: 8300},
		},
		Process: state.Process{Instance: "0123456789abcdef", Start: "0123456789abcdef"},
	}}
}

// open opens the store and runs it until close is called.
func open(b *testing.B, dir string) (s *store.Store, end func()) {
	b.Helper()
	s, err := store.Open(store.Options{
		Datacenter: "dc1", Node: "server-1", Address: "127.0.0.1:1", DataDir: dir, Expect: 1,
		// Nobody renews here.
		Lease: time.Hour,
		Dial: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("there is nobody else")
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for {
		if node, _, _ := s.Leader(); node != "" && s.State().Store() != "" {
			break
		}
		changed := s.Changed()
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond):
		}
	}
	return s, func() {
		stop()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}
}

// BenchmarkScale tells what a store of 300 datacenters of ten servers and two
// gateways costs, and what one change costs with 3,000 processes following. An
// operation is one change, from the registration until the last of them has it.
// They run in a process of their own, on the same processors. 100 of them are whole
// replicas, the others look at nothing but the index of what they are sent.
func BenchmarkScale(b *testing.B) {
	ca := testpki.New(b, "consul")
	caFile, certFile, keyFile := ca.WriteFiles(b, b.TempDir(), ca.Leaf(b, testpki.Server("dc1", "server-1")))
	source, err := certs.Load(certs.Options{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, Domain: "consul"})
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	s, end := open(b, dir)
	fill(b, s)
	end()
	began := time.Now()
	empty := heap()
	s, end = open(b, dir)
	defer end()
	started := time.Since(began)
	if s.State().Len() != datacenters {
		b.Fatalf("%d datacenters after the start, want %d", s.State().Len(), datacenters)
	}
	kept := heap() - empty
	address, shut := serve(b, s, source)
	defer shut()
	before, resident := heap(), rss(b)
	reports, quit := watch(b, address, caFile, certFile, keyFile)
	defer quit()
	first := await(b, reports, s.State().Index())

	var slowest, total time.Duration
	version, used, last := 0, processor(), first
	for b.Loop() {
		version++
		began := time.Now()
		register(b, s, registration(version%datacenters, 0, strconv.Itoa(version)))
		last = await(b, reports, s.State().Index())
		took := last.at.Sub(began)
		total += took
		slowest = max(slowest, took)
		<-time.After(500 * time.Millisecond) // changes that come in a burst travel together
	}
	used = processor() - used
	resident = rss(b) - resident // first, as heap gives nothing back
	following := heap() - before // now that each of them has been sent something
	per := func(d time.Duration) float64 { return float64(d.Milliseconds()) / float64(version) }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(per(total), "ms/change")
	b.ReportMetric(float64(slowest.Milliseconds()), "ms/slowest-change")
	b.ReportMetric(per(used), "cpu-ms/change")
	b.ReportMetric(per(last.processor-first.processor), "followers-cpu-ms/change")
	b.ReportMetric(float64(started.Milliseconds()), "ms/start")
	b.ReportMetric(kept, "MiB/store")
	b.ReportMetric(following, "MiB/followers")
	b.ReportMetric(resident, "MiB/followers-rss")
	b.ReportMetric(size(b, dir), "MiB/disk")
}

// rss is what this process has in memory, free heap and all, in MiB.
func rss(b *testing.B) float64 {
	b.Helper()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0 // not on Linux
	}
	var size, pages int
	if _, err := fmt.Sscan(string(statm), &size, &pages); err != nil {
		b.Fatal(err)
	}
	return float64(pages*os.Getpagesize()) / (1 << 20)
}

// heap is what is in use, in MiB.
func heap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse+m.StackInuse) / (1 << 20)
}

// processor is the time that this process has used, followers aside.
func processor() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// size is what a folder takes on its disk, in MiB.
func size(b *testing.B, dir string) float64 {
	b.Helper()
	var total int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return float64(total) / (1 << 20)
}

// serve answers the API, with everything that a sidecar does before it.
func serve(b *testing.B, s *store.Store, source *certs.Source) (address string, shut func()) {
	b.Helper()
	table, err := alpn.NewTable(nil, alpn.HTTP)
	if err != nil {
		b.Fatal(err)
	}
	api := h2.NewServer(federation.NewAPI(s, federation.APIOptions{
		Datacenter: "dc1", Domain: "consul", Identity: source.PeerIdentity, Log: zap.NewNop(),
	}), h2.ServerOptions{})
	server, err := alpn.NewServer(table, source, alpn.ServerOptions{
		HandshakeTimeout: time.Minute,
		HTTP:             alpn.HandlerFunc(func(ctx context.Context, c *alpn.Conn) { api.ServeConn(ctx, c.Conn) }),
	})
	if err != nil {
		b.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { server.ServeConn(ctx, sniff.NewConn(c, nil), func(bool) bool { return true }) })
		}
	})
	return ln.Addr().String(), func() {
		_ = ln.Close()
		stop()
		wg.Wait()
		api.Close()
	}
}
