// Package scale measures a store of many datacenters, and how long one change
// takes to all who follow it. See docs/scale.md.
package scale

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
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
	"culvert/internal/pause"
	"culvert/internal/testpki"
	"culvert/sniff"
)

const (
	datacenters = 300
	servers     = 10 // of each
	gateways    = 2  // of each
	watchers    = 3000
)

// followers, set in a process that this one starts, makes that one follow the
// store at an address.
const followers = "CULVERT_SCALE_FOLLOW"

func TestMain(m *testing.M) {
	if address := os.Getenv(followers); address != "" {
		if err := follow(address); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err) // and who started it sees it end
		}
		return
	}
	m.Run()
}

// follow runs the watchers, each as a process of its own would: with a
// connection, a replica and all the records. It prints the index that all of them
// have reached, each time that it grows.
func follow(address string) error {
	files := strings.Split(os.Getenv("CULVERT_SCALE_FILES"), ":")
	source, err := certs.Load(certs.Options{CAFile: files[0], CertFile: files[1], KeyFile: files[2], Domain: "consul"})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { // until the parent closes the pipe
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		stop()
	}()
	var all []*federation.Replica
	var wg sync.WaitGroup
	dialing := make(chan struct{}, 16)
	var known *state.State
	for range watchers {
		transport := h2.NewTransport(func(ctx context.Context, to string) (*tls.Conn, error) {
			dialing <- struct{}{}
			defer func() { <-dialing }()
			name, _, err := net.SplitHostPort(to)
			if err != nil {
				return nil, err
			}
			d := tls.Dialer{Config: source.ClientConfig(name, []string{alpn.HTTP})}
			c, err := d.DialContext(ctx, "tcp", address)
			if err != nil {
				return nil, err
			}
			return c.(*tls.Conn), nil //nolint:forcetypeassert // of a tls.Dialer
		}, h2.TransportOptions{DialTimeout: 5 * time.Minute})
		r := federation.NewReplica(federation.ReplicaOptions{
			Client: federation.NewClient(federation.ClientOptions{Primary: "dc1", Domain: "consul", Transport: transport}),
			Known:  known,
		})
		all = append(all, r)
		changed := r.Changed()
		wg.Go(func() { _ = r.Run(ctx) })
		if known == nil { // the others share the first one's records: all of them 3,000 times are too much for one host
			<-changed
			known = r.State()
		}
	}
	for _, r := range all { // nothing is to change before they all follow
		for r.Status().Contact.IsZero() {
			if !pause.For(ctx, 10*time.Millisecond) {
				return ctx.Err()
			}
		}
	}
	for reached := uint64(0); ; {
		lowest := all[0]
		for _, r := range all {
			if r.State().Index() < lowest.State().Index() {
				lowest = r
			}
		}
		changed := lowest.Changed()
		if index := lowest.State().Index(); index > reached {
			reached = index
			_, _ = fmt.Fprintf(os.Stdout, "%d %d\n", index, time.Now().UnixNano()) // its reader ends it
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			wg.Wait()
			return nil
		}
	}
}

// fill registers everything that there is.
func fill(b *testing.B, s *store.Store) {
	b.Helper()
	var wg sync.WaitGroup
	work := make(chan state.Registration)
	for range 64 {
		wg.Go(func() {
			for r := range work {
				if _, err := s.Register(b.Context(), r); err != nil {
					b.Errorf("register %s: %v", r.Key(), err)
				}
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
// They run in a process of their own, on the same processors.
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
	before := heap()
	lines, quit := watch(b, address, caFile, certFile, keyFile)
	defer quit()
	await(b, lines, s.State().Index())
	following := heap() - before

	var slowest, total time.Duration
	version, used := 0, processor()
	for b.Loop() {
		version++
		began := time.Now()
		if _, err := s.Register(b.Context(), registration(version%datacenters, 0, strconv.Itoa(version))); err != nil {
			b.Fatal(err)
		}
		took := await(b, lines, s.State().Index()).Sub(began)
		total += took
		slowest = max(slowest, took)
		<-time.After(500 * time.Millisecond) // changes that come in a burst travel together
	}
	used = processor() - used
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(used.Milliseconds())/float64(version), "cpu-ms/change")
	b.ReportMetric(float64(total.Milliseconds())/float64(version), "ms/change")
	b.ReportMetric(float64(slowest.Milliseconds()), "ms/slowest-change")
	b.ReportMetric(float64(started.Milliseconds()), "ms/start")
	b.ReportMetric(kept, "MiB/store")
	b.ReportMetric(following, "MiB/followers")
	b.ReportMetric(size(b, dir), "MiB/disk")
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

// watch starts the followers, and returns what they print.
func watch(b *testing.B, address string, files ...string) (lines <-chan string, quit func()) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), followers+"="+address, "CULVERT_SCALE_FILES="+strings.Join(files, ":"))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	out := make(chan string, 64)
	go func() {
		defer close(out)
		for in := bufio.NewScanner(stdout); in.Scan(); {
			out <- in.Text()
		}
	}()
	return out, func() {
		_ = stdin.Close()
		for range out { // until it has ended
		}
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	}
}

// await returns when all followers had an index, by the clock of their process,
// which is this one's.
func await(b *testing.B, lines <-chan string, index uint64) time.Time {
	b.Helper()
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				b.Fatal("the followers have ended")
			}
			at, when, _ := strings.Cut(line, " ")
			reached, err := strconv.ParseUint(at, 10, 64)
			nanos, errWhen := strconv.ParseInt(when, 10, 64)
			if err != nil || errWhen != nil {
				b.Fatalf("the followers say %q", line)
			}
			if reached >= index {
				return time.Unix(0, nanos)
			}
		case <-time.After(5 * time.Minute):
			b.Fatalf("the followers have not reached index %d", index)
		}
	}
}
