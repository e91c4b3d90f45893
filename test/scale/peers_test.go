package scale

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/internal/testpki"
	"culvert/packet"
	"culvert/sniff"
)

// What one sidecar costs that has many peers: bin/culvert on one side, and on the
// other one process in which there is everything that matters of each peer: its
// certificate, its link and receiver, by the packages that a sidecar has them from.

// peersIn, set in a process that this one starts, makes that one the peers.
const peersIn = "CULVERT_SCALE_PEERS"

const (
	aliceService = "gossip-packet"
	gossipPort   = 8302
)

// A peerPlan is what the peers' process is told.
type peerPlan struct {
	Dir    string // for alice's files
	Warm   int    // peers that are there
	Listen string // of all peers
	Alice  string // her sidecar
	Be     string // be something else instead, one of instead
}

// peerName is of a peer. Those with even numbers are lower than alice, who is in
// dc1, and dial her; she dials the others.
func peerName(i int) catalog.Key {
	return catalog.Key{Datacenter: map[bool]string{true: "dc0", false: "dc2"}[i%2 == 0], Node: fmt.Sprintf("node-%d", i)}
}

func peerAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 211, byte(i / 250), byte(i%250 + 1)})
}

// TestPeers is no test of anything: see [peersIn].
func TestPeers(t *testing.T) {
	text := os.Getenv(peersIn)
	if text == "" {
		return
	}
	var plan peerPlan
	if err := json.Unmarshal([]byte(text), &plan); err != nil {
		t.Fatal(err)
	}
	if plan.Be != "" {
		instead[plan.Be](t, plan)
		return
	}
	ca := testpki.New(t, "consul")
	ca.WriteFiles(t, plan.Dir, ca.Leaf(t, testpki.Server("dc1", "alice")))
	p := newPeers(t, plan, ca)
	fmt.Println("ready") //nolint:forbidigo // to who has started this
	_, _ = io.Copy(io.Discard, os.Stdin)
	p.stop()
}

// peers are all of them.
type peers struct {
	recv  *packet.Receiver
	pulse *packet.Pulse
	links map[catalog.Key]*packet.Link
	stop  func()
}

// credentials are one peer's: its certificate, and everything else of a source that
// is alice's.
type credentials struct {
	*certs.Source
	cert func(name string) *tls.Certificate
	own  *tls.Certificate
}

func (c credentials) ServerConfig(protos []string, admit func(string) (certs.Admission, error)) *tls.Config {
	cfg := c.Source.ServerConfig(protos, admit)
	inner := cfg.GetConfigForClient
	cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		one, err := inner(h)
		if err != nil {
			return nil, err
		}
		one = one.Clone()
		one.Certificates = nil
		one.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return c.cert(h.ServerName), nil }
		return one, nil
	}
	return cfg
}

func (c credentials) ClientConfig(name string, protos []string) *tls.Config {
	cfg := c.Source.ClientConfig(name, protos)
	cfg.Certificates = nil
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.own, nil }
	return cfg
}

func newPeers(t *testing.T, plan peerPlan, ca *testpki.CA) *peers {
	t.Helper()
	source, err := certs.Load(certs.Options{
		CAFile: filepath.Join(plan.Dir, "ca.pem"), CertFile: filepath.Join(plan.Dir, "cert.pem"), KeyFile: filepath.Join(plan.Dir, "key.pem"), Domain: "consul",
	})
	if err != nil {
		t.Fatal(err)
	}
	table, err := alpn.NewTable([]alpn.Service{{Name: aliceService, Kind: alpn.KindPacket, ALPN: "consul/wan-gossip/packet"}})
	if err != nil {
		t.Fatal(err)
	}
	p := &peers{recv: packet.NewReceiver(packet.ReceiverOptions{}), pulse: packet.NewPulse(), links: make(map[catalog.Key]*packet.Link)}
	alice := catalog.Key{Datacenter: "dc1", Node: "alice"}
	byName := make(map[string]*tls.Certificate)
	for i := range plan.Warm {
		key := peerName(i)
		leaf := ca.Leaf(t, testpki.Server(key.Datacenter, key.Node))
		byName[certs.ServerName(key.Node, key.Datacenter, "consul")] = &leaf.TLS
		dialer := alpn.NewDialer(table, credentials{Source: source, own: &leaf.TLS}, alpn.DialerOptions{})
		dial := func(ctx context.Context) (packet.Conn, error) {
			var d net.Dialer
			raw, err := d.DialContext(ctx, "tcp", plan.Alice)
			if err != nil {
				return nil, err
			}
			c, err := dialer.Dial(ctx, raw, certs.ServerName("alice", "dc1", "consul"), aliceService)
			if err != nil {
				return nil, err
			}
			return c, nil
		}
		p.links[key] = packet.NewLink(dial, packet.LinkOptions{
			Self: key, Peer: alice, Service: aliceService, Receiver: p.recv, Pulse: p.pulse,
			Deliver: p.answer(key), Spread: 2 * time.Second,
		})
	}
	p.serve(t, plan, table, credentials{Source: source, cert: func(name string) *tls.Certificate { return byName[name] }})
	return p
}

// answer sends each packet back that asks for that.
func (p *peers) answer(key catalog.Key) packet.Deliver {
	return func(packets [][]byte) (int, error) {
		for _, b := range packets {
			if b[0] == 'a' {
				p.links[key].Send([]byte("answer"), false)
			}
		}
		return len(packets), nil
	}
}

// serve listens for all peers, and starts their links.
func (p *peers) serve(t *testing.T, plan peerPlan, table *alpn.Table, creds alpn.Credentials) {
	t.Helper()
	server, err := alpn.NewServer(table, creds, alpn.ServerOptions{
		Packet: alpn.HandlerFunc(func(ctx context.Context, c *alpn.Conn) {
			node, dc, _ := strings.Cut(c.ConnectionState().ServerName, ".server.")
			dc, _, _ = strings.Cut(dc, ".")
			key := catalog.Key{Datacenter: dc, Node: node}
			_ = p.recv.Serve(ctx, c, catalog.Key{Datacenter: "dc1", Node: "alice"}, p.links[key], p.answer(key)) // the peers' side is of no interest
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp4", plan.Listen)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = p.pulse.Run(ctx) })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { server.ServeConn(ctx, sniff.NewConn(c, nil), func(bool) bool { return true }) })
		}
	})
	for _, l := range p.links {
		l.Start(ctx)
	}
	p.stop = func() {
		_ = ln.Close()
		cancel()
		for _, l := range p.links {
			wg.Go(l.Stop)
		}
		wg.Wait()
	}
}

// A subject is the sidecar that is measured.
type subject struct {
	b     *testing.B
	pid   int
	admin string

	peerAddr func(i int) netip.Addr
	udp      *net.UDPConn // its server's
	came     atomic.Int64
	ready    time.Duration // from its start
}

// startPeers starts the peers and then alice's sidecar, which knows of more.
func startPeers(b *testing.B, configured, warm int) *subject {
	b.Helper()
	plan := peerPlan{Dir: b.TempDir(), Warm: warm, Listen: "127.210.0.2:8443", Alice: "127.210.0.1:8443"}
	startOthers(b, plan)
	s := &subject{b: b, admin: "127.210.0.1:7440", peerAddr: peerAddr}
	var err error
	if s.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP("127.210.0.11"), Port: gossipPort}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.udp.Close() })
	_ = s.udp.SetReadBuffer(4 << 20)
	go s.take()
	s.start(plan, configured)
	return s
}

// startOthers starts the peers' process, or what else the plan has it be, and waits
// until it is ready.
func startOthers(b *testing.B, plan peerPlan) (pid int) {
	b.Helper()
	text, err := json.Marshal(plan)
	if err != nil {
		b.Fatal(err)
	}
	others := exec.Command(os.Args[0], "-test.run", "^TestPeers$", "-test.timeout", "10m")
	others.Env = append(os.Environ(), peersIn+"="+string(text))
	others.Stderr = os.Stderr
	stdin, err1 := others.StdinPipe()
	stdout, err2 := others.StdoutPipe()
	if err := errors.Join(err1, err2, others.Start()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = stdin.Close()
		_ = others.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		b.Fatalf("the peers' process says %q, %v", line, err)
	}
	return others.Process.Pid
}

func (s *subject) start(plan peerPlan, configured int) {
	s.b.Helper()
	program, err := filepath.Abs("../../bin/culvert")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		s.b.Fatalf("no program to measure: %v; `make build` makes it", err)
	}
	file := filepath.Join(plan.Dir, "sidecar.hcl")
	if err := os.WriteFile(file, []byte(s.config(plan, configured)), 0o600); err != nil {
		s.b.Fatal(err)
	}
	log, err := os.Create(filepath.Join(plan.Dir, "log"))
	if err != nil {
		s.b.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(program, "sidecar", "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	began := time.Now()
	if err := cmd.Start(); err != nil {
		s.b.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	s.b.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-done:
			if err != nil {
				text, _ := os.ReadFile(log.Name())
				s.b.Errorf("the sidecar ended with %v:\n%.3000s", err, text)
			}
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			s.b.Error("the sidecar does not stop within 20 s")
		}
	})
	for s.get("/readyz") == nil {
		if time.Since(began) > time.Minute {
			s.b.Fatal("not ready after a minute")
		}
		<-time.After(5 * time.Millisecond)
	}
	s.ready = time.Since(began)
}

func (s *subject) config(plan peerPlan, configured int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `datacenter = "dc1"
node = "alice"
server {
  profile   = "consul"
  address   = "127.210.0.11"
  advertise = "127.210.0.10"
}
listen { address = %q }
admin { address = %q }
tls {
  ca_file   = %q
  cert_file = %q
  key_file  = %q
}
datacenter "dc0" { mode = "direct" }
datacenter "dc2" { mode = "direct" }
`, plan.Alice, s.admin, filepath.Join(plan.Dir, "ca.pem"), filepath.Join(plan.Dir, "cert.pem"), filepath.Join(plan.Dir, "key.pem"))
	for i := range configured {
		key, at := peerName(i), plan.Listen
		if i >= plan.Warm {
			at = "127.210.0.3:8443" // where nobody is
		}
		fmt.Fprintf(&b, "peer %q {\n  datacenter = %q\n  advertise = \"%s\"\n  address = %q\n}\n", key.Node, key.Datacenter, peerAddr(i), at)
	}
	return b.String()
}

// get reads a path on the admin address; nil unless the answer is 200.
func (s *subject) get(path string) []byte {
	client := http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + s.admin + path)
	if err != nil {
		return nil
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return nil
	}
	return body
}

// up is how many peers are.
func (s *subject) up() (count int) {
	s.b.Helper()
	var status struct {
		Peers []struct {
			State string `json:"state"`
		} `json:"peers"`
	}
	if err := json.Unmarshal(s.get("/v1/status"), &status); err != nil {
		s.b.Fatal(err)
	}
	for _, p := range status.Peers {
		if p.State == "up" {
			count++
		}
	}
	return count
}

func (s *subject) take() {
	buf := make([]byte, 2048)
	for {
		if _, _, err := s.udp.ReadFromUDPAddrPort(buf); err != nil {
			return
		}
		s.came.Add(1)
	}
}

// lasting is how many seconds each kind of traffic lasts. In short they are what shows
// that all of it works.
func lasting() int {
	if testing.Short() {
		return 1
	}
	return 10
}

// traffic sends each of the first peers a packet a second, and returns what the sidecar used of one core meanwhile, in percent, and how many
// packets came back. Without packets it only waits.
func (s *subject) traffic(warm int, packet string) (share float64, back int64) {
	s.b.Helper()
	seconds := lasting()
	used, began, before := s.processor(), time.Now(), s.came.Load()
	sent := 0
	for packet != "" && sent < warm*seconds {
		due := int(time.Since(began).Seconds() * float64(warm))
		for ; sent < min(due, warm*seconds); sent++ {
			to := netip.AddrPortFrom(s.peerAddr(sent%warm), gossipPort)
			if _, err := s.udp.WriteToUDPAddrPort([]byte(packet), to); err != nil {
				s.b.Fatal(err)
			}
		}
		<-time.After(2 * time.Millisecond)
	}
	<-time.After(time.Until(began.Add(time.Duration(seconds) * time.Second)))
	took := time.Since(began)
	used = s.processor() - used
	return 100 * used.Seconds() / took.Seconds(), s.came.Load() - before
}

// processor is the CPU time of all threads of the sidecar, by the scheduler's count.
func (s *subject) processor() (sum time.Duration) {
	s.b.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", s.pid))
	if err != nil || len(tasks) == 0 {
		s.b.Fatalf("no threads of %d: %v", s.pid, err)
	}
	for _, task := range tasks {
		var ran time.Duration
		if text, err := os.ReadFile(task); err == nil { // a thread may have ended
			_, _ = fmt.Sscan(string(text), &ran)
			sum += ran
		}
	}
	return sum
}

// memory is the sidecar's proportional set size, in MiB (proc(5), smaps_rollup).
func (s *subject) memory() float64 {
	s.b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", s.pid))
	if err != nil {
		s.b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib float64
		if _, err := fmt.Sscanf(line, "Pss: %f kB", &kib); err == nil {
			return kib / 1024
		}
	}
	s.b.Fatalf("no Pss in %s", text)
	return 0
}

// counts are the sidecar's goroutines and descriptors.
func (s *subject) counts() (goroutines, descriptors float64) {
	s.b.Helper()
	for line := range strings.Lines(string(s.get("/metrics"))) {
		_, _ = fmt.Sscanf(line, "go_goroutines %f", &goroutines)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.pid))
	if err != nil {
		s.b.Fatal(err)
	}
	return goroutines, float64(len(entries))
}

// await waits until so many peers are up, and returns how long that took.
func (s *subject) await(warm int) time.Duration {
	s.b.Helper()
	began := time.Now()
	for {
		n := s.up()
		if n == warm {
			return time.Since(began)
		}
		if time.Since(began) > 2*time.Minute {
			s.b.Fatalf("%d of %d peers are up", n, warm)
		}
		<-time.After(200 * time.Millisecond)
	}
}

// BenchmarkPeers measures a sidecar with as many peers as are configured, of which
// some are there. See docs/performance.md.
func BenchmarkPeers(b *testing.B) {
	for _, c := range []struct{ configured, warm int }{{10, 10}, {500, 500}, {1000, 1000}, {5000, 500}} {
		b.Run(fmt.Sprintf("%d of %d", c.warm, c.configured), func(b *testing.B) {
			for b.Loop() {
				s := startPeers(b, c.configured, c.warm)
				warm := s.await(c.warm)
				<-time.After(3 * time.Second) // surplus connections end
				b.ReportMetric(s.ready.Seconds(), "s/ready")
				b.ReportMetric(warm.Seconds(), "s/warm")
				quiet, _ := s.traffic(c.warm, "")
				b.ReportMetric(quiet, "%-quiet")
				b.ReportMetric(s.memory(), "MiB-PSS")
				goroutines, descriptors := s.counts()
				b.ReportMetric(goroutines, "goroutines")
				b.ReportMetric(descriptors, "descriptors")
				oneWay, back := s.traffic(c.warm, "packet")
				if back != 0 {
					b.Errorf("%d packets came back that nobody asked for", back)
				}
				b.ReportMetric(oneWay, "%-packets")
				answered, back := s.traffic(c.warm, "ask")
				<-time.After(100 * time.Millisecond)
				if want := int64(c.warm * lasting()); back < want*99/100 {
					b.Errorf("%d answers came of %d", back, want)
				}
				b.ReportMetric(answered, "%-answered")
				for _, what := range []string{"relay", "least"} {
					bare, _ := startRelay(b, what, c.warm).traffic(c.warm, "packet")
					b.ReportMetric(bare, "%-"+what)
					b.ReportMetric(oneWay/bare, "packets/"+what)
				}
				b.ReportMetric(s.memory(), "MiB-PSS-after")
				if n := s.up(); n != c.warm {
					b.Errorf("%d of %d peers are up", n, c.warm)
				}
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
