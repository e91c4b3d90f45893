package store

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/federation/state"
)

// The size that docs/scale.md is about.
const (
	benchDatacenters = 300
	benchServers     = 10 // of each, and two gateways
)

func benchEntries() []state.Registration {
	var all []state.Registration
	for dc := range benchDatacenters {
		name := fmt.Sprintf("dc%d", dc)
		for i := range benchServers {
			all = append(all, benchServer(name, dc, i))
		}
		for i := range 2 {
			all = append(all, state.Registration{Datacenter: name, Gateway: &state.Gateway{
				Name: fmt.Sprintf("gw%d", i), Address: fmt.Sprintf("10.0.0.%d:8443", i+1),
				WANAddress: fmt.Sprintf("203.0.%d.%d:8443", dc%256, i+1), Version: "0.1.0",
				Process: state.Process{Start: "abcdefghijklmnopqrstuvwxyz"},
			}})
		}
	}
	return all
}

func benchServer(name string, dc, i int) state.Registration {
	return state.Registration{Datacenter: name, Server: &state.Server{
		Node: fmt.Sprintf("server%d", i), Advertise: netip.AddrFrom4([4]byte{10, byte(1 + dc/256), byte(dc), byte(i)}),
		Address: fmt.Sprintf("10.0.1.%d:8443", i+1), Version: "0.1.0",
		Services: []state.Service{
			{Name: "gossip-packet", Kind: "packet", Port: 8302},
			{Name: "gossip-stream", Kind: "stream", Port: 8302},
			{Name: "rpc", Kind: "stream", Port: 8300},
		},
		Process: state.Process{Instance: "abcdefghijklmnopqrstuvwxyz", Start: "abcdefghijklmnopqrstuvwxyz"},
	}}
}

// benchStore is a store of one server with all entries in it.
func benchStore(b *testing.B) (*Store, string) {
	b.Helper()
	dir := b.TempDir()
	s, err := Open(Options{Datacenter: "dc0", Node: "server0", Address: "10.0.1.1:8443", DataDir: dir, Expect: 1, Dial: new(noDial).dial})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Run(ctx) })
	b.Cleanup(func() { cancel(); wg.Wait() })
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, _, err := s.leading(); err == nil {
			break
		}
		<-tick.C
	}
	var fill sync.WaitGroup
	for _, reg := range benchEntries() {
		fill.Go(func() {
			if _, err := s.Register(ctx, reg); err != nil {
				b.Error(err)
			}
		})
	}
	fill.Wait()
	return s, dir
}

func loaded(b *testing.B) *state.State {
	b.Helper()
	s := state.New()
	for i, reg := range benchEntries() {
		reg = normal(reg)
		next, err := s.Apply(uint64(i+1), state.Command{Register: &reg, At: time.Unix(1e9, 0)})
		if err != nil {
			b.Fatal(err)
		}
		s = next
	}
	return s
}

// One registration at a time that changes something: one sync each.
func BenchmarkStoreRegister(b *testing.B) {
	s, dir := benchStore(b)
	reg := benchServer("dc7", 7, 3)
	b.ResetTimer()
	for i := range b.N {
		reg.Server.Version = fmt.Sprintf("0.1.%d", i+1)
		if _, err := s.Register(b.Context(), reg); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := s.current().raft.Snapshot().Error(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(folder(b, dir))/(1<<20), "disk-MiB")
}

// Registrations of 64 servers at once: a sync is for many of them.
func BenchmarkStoreRegisterAtOnce(b *testing.B) {
	s, _ := benchStore(b)
	var at atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		id := int(at.Add(1))
		for i := 0; pb.Next(); i++ {
			reg := benchServer(fmt.Sprintf("dc%d", id), id, 3)
			reg.Server.Version = fmt.Sprintf("0.1.%d", i+1)
			if _, err := s.Register(b.Context(), reg); err != nil {
				b.Error(err)
			}
		}
	})
}

// A renewal writes nothing.
func BenchmarkStoreRenew(b *testing.B) {
	s, _ := benchStore(b)
	reg := benchServer("dc7", 7, 3)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Register(b.Context(), reg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStoreApply(b *testing.B) {
	s := loaded(b)
	reg := normal(benchServer("dc7", 7, 3))
	for i := range b.N {
		reg.Server.Version = fmt.Sprintf("0.1.%d", i+1)
		next, err := s.Apply(s.Index()+1, state.Command{Register: &reg, At: time.Unix(1e9, 0)})
		if err != nil {
			b.Fatal(err)
		}
		s = next
	}
}

func BenchmarkStoreSnapshot(b *testing.B) {
	s := loaded(b)
	var size int
	for b.Loop() {
		out, err := s.MarshalJSON()
		if err != nil {
			b.Fatal(err)
		}
		size = len(out)
	}
	b.ReportMetric(float64(size)/(1<<20), "MiB")
}

func BenchmarkStoreRestore(b *testing.B) {
	out, err := loaded(b).MarshalJSON()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := state.Load(out); err != nil {
			b.Fatal(err)
		}
	}
}

// How much of the heap a state takes, and the store around it with its log.
func BenchmarkStoreMemory(b *testing.B) {
	for range b.N {
		before := heap()
		s := loaded(b)
		one := heap() - before
		store, _ := benchStore(b)
		b.ReportMetric(float64(one)/(1<<20), "state-MiB")
		b.ReportMetric(float64(heap()-before-one)/(1<<20), "store-MiB")
		runtime.KeepAlive(s)
		runtime.KeepAlive(store)
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func folder(b *testing.B, dir string) (size int64) {
	b.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		size += info.Size()
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return size
}

// noDial is for a store that has nobody to dial.
type noDial struct{}

func (*noDial) dial(context.Context, string, string) (net.Conn, error) { return nil, errUnreachable }
