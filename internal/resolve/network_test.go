package resolve

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// server runs a real name server on loopback, UDP and TCP on one port, and
// returns a resolver that asks it and nobody else.
func server(t *testing.T, handler dns.HandlerFunc) *Resolver {
	t.Helper()
	var packets net.PacketConn
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	for range 20 { // the same port may be taken for UDP
		if err != nil {
			t.Fatal(err)
		}
		if packets, err = net.ListenPacket("udp", ln.Addr().String()); err == nil {
			break
		}
		_ = ln.Close()
		ln, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if packets == nil {
		t.Fatal("no port is free for both UDP and TCP")
	}
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: ln, Handler: handler}} {
		started, ended := make(chan struct{}), make(chan error, 1)
		s.NotifyStartedFunc = func() { close(started) }
		go func() { ended <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			if err := errors.Join(s.Shutdown(), <-ended); err != nil {
				t.Error(err)
			}
		})
	}
	dir := t.TempDir()
	o := Options{HostsFile: filepath.Join(dir, "hosts"), ResolvConf: filepath.Join(dir, "resolv.conf"), Timeout: 2 * time.Second}
	write(t, o.ResolvConf, "nameserver 127.0.0.1\noptions attempts:1\n")
	r := New(o)
	config, err := r.servers.load()
	if err != nil {
		t.Fatal(err)
	}
	_, config.Port, _ = net.SplitHostPort(ln.Addr().String())
	t.Cleanup(r.Close)
	return r
}

func respond(t *testing.T, w dns.ResponseWriter, q *dns.Msg, change func(m *dns.Msg), addrs ...string) {
	m := message(q.Question[0].Name, q.Question[0].Qtype, 60, addrs...)
	answers := m.Answer
	m.SetReply(q)
	m.Answer = answers
	if change != nil {
		change(m)
	}
	if err := w.WriteMsg(m); err != nil {
		t.Error(err)
	}
}

func TestRealServer(t *testing.T) {
	r := server(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if opt := q.IsEdns0(); opt == nil || opt.UDPSize() != udpSize {
			t.Errorf("question without room for %d bytes: %v", udpSize, q)
		}
		respond(t, w, q, nil, "192.0.2.1", "192.0.2.2", "2001:db8::1")
	})
	a := lookup(t, r, "gw.example", "192.0.2.1", "192.0.2.2", "2001:db8::1")
	if left := time.Until(a.Expires); left < 55*time.Second || left > time.Minute {
		t.Errorf("expires in %v", left)
	}
}

func TestCutAnswersAreAskedForOverTCP(t *testing.T) {
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("192.0.2.%d", i))
	}
	var udp, tcp atomic.Int32
	r := server(t, func(w dns.ResponseWriter, q *dns.Msg) {
		overUDP := w.RemoteAddr().Network() == "udp"
		if overUDP {
			udp.Add(1)
		} else {
			tcp.Add(1)
		}
		respond(t, w, q, func(m *dns.Msg) {
			if overUDP {
				m.Truncate(udpSize)
			}
		}, many...)
	})
	lookup(t, r, "gw.example", many...)
	if udp.Load() != 2 || tcp.Load() != 1 {
		t.Errorf("asked %d times over UDP and %d over TCP, want 2 and 1", udp.Load(), tcp.Load())
	}
}

func TestSilentServerIsGivenUp(t *testing.T) {
	r := server(t, func(dns.ResponseWriter, *dns.Msg) {})
	r.timeout = 200 * time.Millisecond
	began := time.Now()
	_, err := r.Lookup(t.Context(), "gw.example")
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("Lookup: %v, want a timeout", err)
	}
	if took := time.Since(began); took < 200*time.Millisecond || took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// Closing does not wait for a server that does not answer.
func TestCloseDoesNotWaitForAServer(t *testing.T) {
	asked := make(chan struct{}, 8)
	r := server(t, func(dns.ResponseWriter, *dns.Msg) { asked <- struct{}{} })
	r.timeout = time.Minute
	ended := make(chan error)
	go func() {
		_, err := r.Lookup(t.Context(), "gw.example")
		ended <- err
	}()
	<-asked
	began := time.Now()
	r.Close()
	if err := <-ended; err == nil {
		t.Error("a question that was ended has an answer")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestServerWithoutTheName(t *testing.T) {
	r := server(t, func(w dns.ResponseWriter, q *dns.Msg) {
		respond(t, w, q, func(m *dns.Msg) { m.Rcode = dns.RcodeNameError })
	})
	if _, err := r.Lookup(t.Context(), "gw.example"); !errors.Is(err, errNoAddress) {
		t.Errorf("Lookup: %v", err)
	}
}

// Bytes that are no answer end a question at once and not the process.
func TestServerThatTalksNonsense(t *testing.T) {
	r := server(t, func(w dns.ResponseWriter, q *dns.Msg) {
		raw, err := q.Pack()
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := w.Write(slices.Concat(raw[:2], []byte{0x81, 0x80, 0xff, 0xff, 0xff, 0xff}, raw[8:])); err != nil {
			t.Error(err)
		}
	})
	if a, err := r.Lookup(t.Context(), "gw.example"); err == nil {
		t.Errorf("Lookup = %v", a)
	}
}

// SRV records over real sockets, cut over UDP, with an alias that lives shorter.
func TestServiceFromARealServer(t *testing.T) {
	z := zone{ttl: 60, hosts: map[string][]string{"gw1.example.": {"192.0.2.1"}, "gw2.example.": {"192.0.2.2", "2001:db8::2"}}}
	z.records = []string{"1 0 8443 gw2.example.", "0 0 8444 gw1.example."}
	for i := range 100 {
		z.records = append(z.records, fmt.Sprintf("2 0 1 none%d.example.", i))
	}
	var tcp atomic.Int32
	r := server(t, func(w dns.ResponseWriter, q *dns.Msg) {
		name := q.Question[0].Name
		m := z.message(name, q.Question[0].Qtype)
		answers := m.Answer
		m.SetReply(q)
		m.Answer = answers
		if q.Question[0].Qtype == dns.TypeSRV {
			alias := &dns.CNAME{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 20}, Target: name}
			m.Answer = slices.Insert(m.Answer, 0, dns.RR(alias))
			if w.RemoteAddr().Network() == "udp" {
				m.Truncate(udpSize)
			} else {
				tcp.Add(1)
			}
		}
		if err := w.WriteMsg(m); err != nil {
			t.Error(err)
		}
	})
	got := addresses4(t, r, service)
	slices.Sort(got[1:])
	if want := []string{"192.0.2.1:8444", "192.0.2.2:8443", "[2001:db8::2]:8443"}; !slices.Equal(got, want) {
		t.Errorf("Addresses = %v, want %v", got, want)
	}
	if tcp.Load() != 1 {
		t.Errorf("asked %d times over TCP", tcp.Load())
	}
	if left := time.Until(r.names[query{"_gw._tcp.example", true}].answer.Expires); left < 15*time.Second || left > 20*time.Second {
		t.Errorf("expires in %v", left)
	}
}
