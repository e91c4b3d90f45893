package scale

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/alpn"
	"culvert/certs"
	"culvert/federation"
	"culvert/federation/state"
	"culvert/internal/h2"
)

// followAt, set in a process that this one starts, makes that one follow the store
// at an address, with the files in followFiles.
const (
	followAt    = "CULVERT_SCALE_FOLLOW"
	followFiles = "CULVERT_SCALE_FILES"
)

func TestMain(m *testing.M) {
	if address := os.Getenv(followAt); address != "" {
		if err := follow(address); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err) // and who started it sees it end
		}
		return
	}
	m.Run()
}

// follow runs the followers: some replicas, as in a sidecar, and for the rest
// readers. It prints each index when the last of them has it.
func follow(address string) error {
	files := strings.Split(os.Getenv(followFiles), ":")
	source, err := certs.Load(certs.Options{CAFile: files[0], CertFile: files[1], KeyFile: files[2], Domain: "consul"})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(context.Background())
	go func() { // until the parent closes the pipe
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		stop(nil)
	}()
	dialing := make(chan struct{}, 16)
	dial := func(ctx context.Context, _ string) (*tls.Conn, error) {
		dialing <- struct{}{}
		defer func() { <-dialing }()
		d := tls.Dialer{Config: source.ClientConfig("server.dc1.consul", []string{alpn.HTTP})}
		c, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		return c.(*tls.Conn), nil //nolint:forcetypeassert // of a tls.Dialer
	}
	var all sync.WaitGroup
	p := &progress{have: make([]uint64, followers)}
	first := newReplica(dial, nil)
	changed := first.Changed()
	all.Go(func() { _ = first.Run(ctx) })
	select {
	case <-changed: // the others share its records: all of them for each are too much for one host
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	known := first.State()
	all.Go(func() { p.watch(ctx, 0, first) })
	for i := 1; i < followers; i++ {
		if i < replicas {
			r := newReplica(dial, known)
			all.Go(func() { _ = r.Run(ctx) })
			all.Go(func() { p.watch(ctx, i, r) })
			continue
		}
		all.Go(func() {
			c, err := dial(ctx, "")
			if err == nil {
				err = newReader(c, known.Store(), known.Index()).run(ctx, func(index uint64) { p.reached(i, index) })
			}
			if err != nil {
				stop(err)
			}
		})
	}
	all.Wait()
	if err := context.Cause(ctx); err != context.Canceled {
		return err
	}
	return nil
}

func newReplica(dial func(context.Context, string) (*tls.Conn, error), known *state.State) *federation.Replica {
	client := federation.NewClient(federation.ClientOptions{
		Primary: "dc1", Domain: "consul", Transport: h2.NewTransport(dial, h2.TransportOptions{DialTimeout: 5 * time.Minute}),
	})
	return federation.NewReplica(federation.ReplicaOptions{Client: client, Known: known})
}

// progress is how far all followers have come.
type progress struct {
	mu     sync.Mutex
	have   []uint64 // by follower
	newest uint64
	there  int // how many have that
}

// reached notes that a follower has an index, which never goes back.
func (p *progress) reached(follower int, index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if index == p.have[follower] {
		return
	}
	p.have[follower] = index
	if index > p.newest {
		p.newest, p.there = index, 0
	}
	if index == p.newest {
		p.there++
	}
	if p.there == len(p.have) {
		_, _ = fmt.Fprintf(os.Stdout, "%d %d %d\n", index, time.Now().UnixNano(), processor()) // its reader ends it
	}
}

// watch notes what a replica has applied. Its first contact counts, though it may
// know everything.
func (p *progress) watch(ctx context.Context, follower int, r *federation.Replica) {
	for r.Status().Contact.IsZero() && ctx.Err() == nil {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		changed := r.Changed()
		p.reached(follower, r.State().Index())
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// report is what the followers say when all of them have an index.
type report struct {
	index     uint64
	at        time.Time     // by the clock of their process, which is this one's
	processor time.Duration // that their process has used
}

// watch starts the followers, and returns what they report.
func watch(b *testing.B, address string, files ...string) (reports <-chan report, quit func()) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), followAt+"="+address, followFiles+"="+strings.Join(files, ":"))
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
	out := make(chan report, 64)
	go func() {
		defer close(out)
		for in := bufio.NewScanner(stdout); in.Scan(); {
			var r report
			var nanos int64
			if _, err := fmt.Sscan(in.Text(), &r.index, &nanos, &r.processor); err != nil {
				b.Errorf("the followers say %q", in.Text())
				return
			}
			r.at = time.Unix(0, nanos)
			out <- r
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

// await returns what the followers report once all of them have an index.
func await(b *testing.B, reports <-chan report, index uint64) report {
	b.Helper()
	late := time.After(5 * time.Minute)
	for {
		select {
		case r, ok := <-reports:
			if !ok {
				b.Fatal("the followers have ended")
			}
			if r.index >= index {
				return r
			}
		case <-late:
			b.Fatal("the followers have not reached index " + strconv.FormatUint(index, 10))
		}
	}
}
