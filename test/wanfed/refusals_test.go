package wanfed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/agent/pool"
	"github.com/hashicorp/consul/tlsutil"
)

// A dial is one attempt of Consul's code, or of what its tests put in its place,
// to reach alice.
type dial struct {
	like string // Consul's test case
	name string // ours
	cert func(p pki) cert

	dc, node string // whom; dc1 and alice unless given
	protocol string
	direct   bool // at the sidecar instead of the gateway

	// An attempt that is refused: what the dialler sees, and the reason that the
	// sidecar, or the gateway, counts.
	sees, reason, gateway string
	// One that is not: what arrives at alice's server.
	arrives string
}

const (
	// What Consul's cases call "some-protocol", and "other-protocol".
	some  = pool.ALPN_RPCMultiplexV2
	other = "consul/other-protocol"

	configALPN = "tlsutil/config_test.go TestConfigurator_ALPNRPCConfig/"
	configSAN  = "tlsutil/config_test.go TestConfigurator_outgoingWrapperALPN_serverHasNoNodeNameInSAN"
	configAuth = "tlsutil/config_test.go TestConfigurator_AuthorizeInternalRPCServerConn/"
	rpcRaft    = "agent/consul/rpc_test.go TestRPC_AuthorizeRaftRPC/native TLS with "
	joinWAN    = "agent/consul/server_test.go TestServer_JoinWAN_viaMeshGateway"
)

func names(names ...string) func(p pki) cert {
	return func(p pki) cert { return p.named(names...) }
}

// node1 is what the raft cases of Consul call node1: a name and the same name
// with the node.
func node1(name string) func(p pki) cert { return names("node1."+name, name, "localhost") }

func nobody(pki) cert { return cert{} }

// The cases of Consul's hostname tests and of those for ALPN, its certificates
// among them, with alice's sidecar in the place of the server. What is not here has
// no meaning for it: "disabled by verify_incoming_rpc", as it cannot be disabled,
// and those of the byte 3, whose TLS is the servers' own.
func dials() []dial {
	aliceCrt, bob, betty := names("server.dc1.consul"), of("dc1", "bob"), of("dc2", "betty")
	return []dial{
		{like: configALPN + "successful protocol negotiation", cert: aliceCrt, protocol: some, arrives: "type 4"},
		{like: configALPN + "protocol negotiation fails", cert: bob, protocol: other, sees: "no application protocol", reason: "unknown_alpn"},
		{like: configALPN + "client certificate is always required", cert: nobody, protocol: some, sees: "bad certificate", reason: "cert_no_certificate"},
		{
			like: configALPN + "bad DC", cert: bob, dc: "dc2", node: "*", protocol: some, direct: true,
			sees: "not server.dc2.consul", reason: "handshake",
		},
		{like: configALPN + "bad DC", name: "at the gateway", cert: bob, dc: "dc9", node: "*", protocol: some, sees: "unrecognized name", gateway: "unknown_name"},
		{like: configSAN, cert: betty, node: "bob", protocol: some, direct: true, sees: "not bob.server.dc1.consul", reason: "handshake"},
		{like: configSAN, name: "at the gateway", cert: betty, node: "bob", protocol: some, sees: "unrecognized name", gateway: "unknown_name"},
		{like: configAuth + "wrong DNSName", cert: names("this-name-is-wrong", "localhost"), protocol: some, sees: "bad certificate", reason: "cert_no_names"},
		{like: configAuth + "wrong CA", cert: otherCA("server.dc1.consul", "localhost"), protocol: some, sees: "bad certificate", reason: "cert_other_ca"},
		{like: configAuth + "missing ext key usage", cert: email, protocol: some, sees: "bad certificate", reason: "cert_key_usage"},
		{like: rpcRaft + "client cert", cert: node1("client.dc1.consul"), protocol: pool.ALPN_RPCRaft, sees: "bad certificate", reason: "cert_role"},
		{
			like: rpcRaft + "server cert in different DC", cert: node1("server.dc2.consul"), protocol: pool.ALPN_RPCRaft,
			sees: "bad certificate", reason: "cert_datacenter",
		},
		{
			like: rpcRaft + "server cert in different DC", name: "forwarding", cert: node1("server.dc2.consul"), protocol: pool.ALPN_RPCRaftForwarding,
			sees: "bad certificate", reason: "cert_datacenter",
		},
		{like: rpcRaft + "server cert in same DC", cert: node1("server.dc1.consul"), protocol: pool.ALPN_RPCRaft, arrives: "type 1"},
		{like: rpcRaft + "server cert in same DC", name: "forwarding", cert: node1("server.dc1.consul"), protocol: pool.ALPN_RPCRaftForwarding, arrives: "type 9"},
		{like: rpcRaft + "server cert in same DC", name: "intermediate", cert: intermediate, protocol: pool.ALPN_RPCRaft, arrives: "type 1"},
		{
			like: rpcRaft + "ConnectCA leaf cert", cert: otherCA("node1.server.dc1.consul", "server.dc1.consul"), protocol: pool.ALPN_RPCRaft,
			sees: "bad certificate", reason: "cert_other_ca",
		},
		{like: joinWAN, cert: betty, protocol: some, arrives: "type 4"},

		// What Consul has no cases for.
		{name: "no ALPN", cert: betty, sees: "no application protocol", reason: "no_alpn"},
		{name: "HTTP alone", cert: betty, protocol: "http/1.1", sees: "no application protocol", reason: "unknown_alpn"},
		{name: "name in upper case", cert: names("Betty.Server.DC2.consul", "server.dc2.consul"), node: "Alice", protocol: some, arrives: "type 4"},
		{name: "any server", cert: betty, node: "*", protocol: some, arrives: "type 4"},
		{name: "wildcard", cert: names("*.server.dc2.consul", "server.dc2.consul"), protocol: some, arrives: "type 4"},
		{name: "other domain", cert: names("betty.server.dc2.example", "server.dc2.example"), protocol: some, sees: "bad certificate", reason: "cert_other_domain"},
		{name: "gateway", cert: names("gw2.gateway.dc2.consul", "gateway.dc2.consul"), protocol: some, sees: "bad certificate", reason: "cert_role"},
		{
			name: "two nodes", cert: names("betty.server.dc2.consul", "bonnie.server.dc2.consul"), protocol: some,
			sees: "bad certificate", reason: "cert_conflicting_names",
		},
		{name: "for servers alone", cert: serverOnly, protocol: some, sees: "bad certificate", reason: "cert_key_usage"},
	}
}

func of(dc, name string) func(p pki) cert { return func(p pki) cert { return p.native(dc, name) } }

// otherCA is a certificate of a CA that alice does not know; its holder knows hers.
func otherCA(dns ...string) func(p pki) cert {
	return func(p pki) cert {
		c := consulPKI(p.t).named(dns...)
		c.ca = p.ca
		return c
	}
}

func email(p pki) cert {
	p.t.Helper()
	return p.generate(tlsutil.CertOpts{DNSNames: []string{"server.dc1.consul"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection}})
}

func serverOnly(p pki) cert {
	p.t.Helper()
	return p.generate(tlsutil.CertOpts{DNSNames: []string{"betty.server.dc2.consul"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
}

// intermediate is a certificate of a CA below alice's, which its holder sends along.
func intermediate(p pki) cert {
	p.t.Helper()
	ca, key, err := tlsutil.GenerateCert(tlsutil.CertOpts{IsCA: true, CA: p.read(p.ca), Signer: p.signer(), Days: 5})
	if err != nil {
		p.t.Fatal(err)
	}
	below := pki{t: p.t, dir: p.t.TempDir()}
	below.ca, below.key = certFiles(below.dir, "intermediate")
	below.write(below.ca, ca)
	below.write(below.key, key)
	c := below.named("node1.server.dc1.consul", "server.dc1.consul")
	p.write(c.cert, p.read(c.cert)+ca)
	c.ca = p.ca
	return c
}

// What Consul's code dials with a wrong name, certificate or protocol is refused,
// with a reason.
func TestRefusals(t *testing.T) {
	w := newWorld(t, consulPKI(t))
	alice := newServer(t, "dc1", w.at(1, 11, rpcPort), nil, nil)
	w.startGateways(1, 2)
	w.startSidecar(2)
	for _, d := range dials() {
		if d.dc == "" {
			d.dc = "dc1"
		}
		if d.node == "" {
			d.node = "alice"
		}
		t.Run(d.like+" "+d.name, func(t *testing.T) {
			p := w.pki
			p.t = t
			before, sidecar, gateways := len(alice.arrivals()), refused("mux", w.sidecar), refused("gateway", w.gateway[1], w.gateway[2])
			err := d.dial(w, d.cert(p))
			if d.arrives != "" {
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, func() error {
					if got := alice.arrivals()[before:]; !slices.Equal(got, []string{d.arrives}) {
						return fmt.Errorf("arrived as %q, want %q", got, d.arrives)
					}
					return nil
				})
				return
			}
			if err == nil || !strings.Contains(err.Error(), d.sees) {
				t.Errorf("the dialler sees %v, want %q", err, d.sees)
			}
			eventually(t, func() error {
				here, there := refused("mux", w.sidecar).since(sidecar), refused("gateway", w.gateway[1], w.gateway[2]).since(gateways)
				if here != d.reason || there != d.gateway {
					return fmt.Errorf("the sidecar counts %q, a gateway %q; want %q and %q", here, there, d.reason, d.gateway)
				}
				return nil
			})
			if got := alice.arrivals(); len(got) > before {
				t.Errorf("alice was reached as %q", got[before:])
			}
		})
	}
}

// dial dials, writes and reads. The error is nil where the server took it.
func (d dial) dial(w *world, c cert) error {
	at := w.gatewayOf(2) // from dc2, as betty
	if d.direct {
		at = func(string) string { return w.at(1, 11, tlsPort) }
	}
	var conn net.Conn
	var err error
	if c == (cert{}) || d.protocol == "" || d.protocol == "http/1.1" {
		conn, err = d.dialPlainly(w, at(""), c)
	} else {
		conn, _, err = pool.DialRPCViaMeshGateway(context.Background(), d.dc, d.node, nil,
			configurator(w.t, c).OutgoingALPNRPCWrapper(), d.protocol, true, at)
	}
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if d.arrives != "" {
		_, err = conn.Write([]byte{1})
		return err
	}
	_ = conn.SetDeadline(time.Now().Add(deadline))
	if _, err = conn.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
		return errors.New("an end without a reason")
	}
	return err
}

// dialPlainly dials as Consul's own tests do where its wrapper refuses by itself:
// without a protocol ("without a target alpn protocol") or a certificate.
func (d dial) dialPlainly(w *world, at string, c cert) (net.Conn, error) {
	cfg := &tls.Config{ServerName: "alice.server.dc1.consul", InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	if d.protocol != "" {
		cfg.NextProtos = []string{d.protocol}
	}
	if c != (cert{}) {
		wrap := configurator(w.t, c).OutgoingALPNRPCWrapper()
		if _, err := wrap(d.dc, d.node, "", nil); err == nil || !strings.Contains(err.Error(), "without a target alpn protocol") {
			return nil, fmt.Errorf("consul's wrapper without a protocol: %w", err)
		}
		pair, err := tls.LoadX509KeyPair(c.cert, c.key)
		if err != nil {
			return nil, err
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return tls.DialWithDialer(&net.Dialer{Timeout: deadline}, "tcp4", at, cfg)
}

// counts are refusals by reason.
type counts map[string]float64

// refused reads the refusals that daemons have counted.
func refused(subsystem string, daemons ...*daemon) counts {
	c := counts{}
	for _, d := range daemons {
		d.t.Helper()
		body, err := d.get("/metrics")
		if err != nil {
			d.t.Fatal(err)
		}
		for line := range strings.Lines(string(body)) {
			rest, ok := strings.CutPrefix(line, "culvert_"+subsystem+`_refused_total{reason="`)
			if !ok {
				continue
			}
			var n float64
			reason, value, _ := strings.Cut(rest, `"} `)
			if _, err := fmt.Sscan(value, &n); err != nil {
				d.t.Fatal(err)
			}
			c[reason] += n
		}
		if len(c) == 0 {
			d.t.Fatalf("%s counts no refusals", d.name)
		}
	}
	return c
}

// since names the reasons that were counted since others were read, without that
// of connections that ended before their first byte: gateways make such to see who
// is there.
func (c counts) since(before counts) string {
	var all []string
	for reason, n := range c {
		for range int(n - before[reason]) {
			if reason != "closed_early" {
				all = append(all, reason)
			}
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// The same cases the other way round: what a sidecar dials that is not who it
// should be gets no byte, of a stream or of a packet, and the status says why.
func TestSidecarRefuses(t *testing.T) {
	w := newWorld(t, consulPKI(t))
	alice := w.newSink()
	w.startGateways(1, 2)
	w.startSidecar(2)
	for _, c := range []struct {
		like, name string
		cert       func(p pki) cert
		incoming   func(c *tlsutil.Configurator) *tls.Config // nil: as Consul's server
		says       string                                    // "" where it is taken
	}{
		{like: configALPN + "successful protocol negotiation", cert: of("dc2", "betty")},
		{
			like: configALPN + "protocol negotiation fails", cert: of("dc2", "betty"), says: "no application protocol",
			incoming: func(c *tlsutil.Configurator) *tls.Config { return c.IncomingALPNRPCConfig([]string{"some-protocol"}) },
		},
		{
			like: configALPN + "no node name in SAN", cert: names("server.dc2.consul"),
			says: "wanted name betty.server.dc2.consul; found names server.dc2.consul",
		},
		{like: configSAN, cert: of("dc2", "bob"), says: "wanted name betty.server.dc2.consul; found names bob.server.dc2.consul"},
		{like: configALPN + "bad DC", cert: of("dc3", "betty"), says: "wanted name betty.server.dc2.consul; found names betty.server.dc3.consul"},
		{like: configAuth + "wrong CA", cert: otherCA("betty.server.dc2.consul"), says: "(other_ca)"},
		{like: configAuth + "missing ext key usage", cert: email, says: "(key_usage)"},
		{like: rpcRaft + "client cert", cert: node1("client.dc2.consul"), says: "wanted name betty.server.dc2.consul"},
		{
			name: "no ALPN", cert: of("dc2", "betty"), says: "negotiate protocol",
			// What Consul's server takes behind the byte 3.
			incoming: func(c *tlsutil.Configurator) *tls.Config { return c.IncomingRPCConfig() },
		},
		{
			name: "server refuses the sidecar", says: "refused by the far side",
			cert: func(p pki) cert {
				c := p.native("dc2", "betty")
				c.ca = consulPKI(p.t).ca
				return c
			},
		},
		{name: "wildcard", cert: names("*.server.dc2.consul", "server.dc2.consul")},
		{name: "name in upper case", cert: names("Betty.Server.DC2.consul")},
	} {
		t.Run(c.like+" "+c.name, func(t *testing.T) {
			p := w.pki
			p.t = t
			cfg := configurator(t, c.cert(p))
			got := make(chan string, 16)
			newServer(t, "dc2", w.at(2, 11, rpcPort), cfg, func(s *server) {
				if c.incoming != nil {
					s.incoming = func() *tls.Config { return c.incoming(cfg) }
				}
				s.raw = func(protocol string, conn net.Conn) {
					defer func() { _ = conn.Close() }()
					b := make([]byte, 100)
					if n, _ := conn.Read(b); n > 0 {
						got <- protocol + " " + string(b[:n])
					}
				}
			})
			if c.says == "" {
				w.reaches(t, alice, got)
				return
			}
			before := w.sidecar.metric("culvert_stream_failures_total", `direction="out"`)
			w.refusedStream(t, w.at(2, 1, gossipPort), []byte("stream"))
			eventually(t, func() error {
				if n := w.sidecar.metric("culvert_stream_failures_total", `direction="out"`) - before; n != 1 {
					return fmt.Errorf("%v streams are counted as failed", n)
				}
				return nil
			})
			alice.sendTo(t, w.at(2, 1, gossipPort), "packet")
			eventually(t, func() error {
				if p := w.sidecar.peer("betty"); p.State != "down" || !strings.Contains(p.LastError, c.says) {
					return fmt.Errorf("status is %+v, want an error with %q", p, c.says)
				}
				return nil
			})
			if len(got) > 0 {
				t.Errorf("%q has arrived", <-got)
			}
		})
	}
}

// reaches sends a packet and a stream to betty's server, until both are there.
func (w *world) reaches(t *testing.T, alice *sink, got <-chan string) {
	t.Helper()
	c, err := net.DialTCP("tcp4", nil, tcpAddr(t, w.at(2, 1, gossipPort)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("stream")); err != nil {
		t.Fatal(err)
	}
	packet, stream := false, false
	eventually(t, func() error {
		alice.sendTo(t, w.at(2, 1, gossipPort), "packet") // the last case's failures may have it wait
		select {
		case what := <-got:
			packet = packet || what == pool.ALPN_WANGossipPacket+" \x00\x00\x00\x06packet"
			stream = stream || what == pool.ALPN_WANGossipStream+" stream"
		default:
		}
		if !packet || !stream {
			return fmt.Errorf("packet %v, stream %v", packet, stream)
		}
		return nil
	})
}

// A sidecar does not start with a certificate that is not its own: what Consul's
// "no node name in SAN" finds when it dials.
func TestValidateFindsTheWrongCertificate(t *testing.T) {
	w := newWorld(t, consulPKI(t))
	for name, want := range map[string]string{"server.dc1.consul": "alice", "bob.server.dc1.consul": "alice", "alice.server.dc2.consul": "dc1"} {
		file := t.TempDir() + "/sidecar.hcl"
		if err := os.WriteFile(file, []byte(w.sidecarConfig(w.pki.named(name), 2)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := run(t, ".", "validate", file)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(out, want) {
			t.Errorf("with a certificate for %s: %v: %s", name, err, out)
		}
	}
}
