package wanfed

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	gossipPort = 8302 // Consul's, in the WAN
	rpcPort    = 8300
	tlsPort    = 8443 // Culvert's

	// deadline bounds whatever a test waits for.
	deadline = 20 * time.Second
)

// A world is up to three datacenters. In dc1 is alice, a server that knows
// nothing of gateways, with a sidecar. In dc2 and dc3 are native servers, betty
// and bonnie. Each has a gateway of ours; those of dc2 and dc3 lead to the native
// server's RPC port, as Consul's mesh gateways do.
//
//	127.x.<dc>.1    what a server's peers are told
//	127.x.<dc>.9    the gateway
//	127.x.<dc>.11   the server, and alice's sidecar
type world struct {
	t       testing.TB
	n       int // x
	pki     pki
	sidecar *daemon
	gateway map[int]*daemon
	nodes   map[int]string // other names of native servers
}

// newWorld finds a part of loopback that nobody uses.
func newWorld(t testing.TB, p pki) *world {
	t.Helper()
	for n := 200; n < 250; n++ {
		ln, err := net.Listen("tcp4", fmt.Sprintf("127.%d.0.1:%d", n, tlsPort))
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = ln.Close() }) // the first to be made is the last to be closed
		return &world{t: t, n: n, pki: p, gateway: make(map[int]*daemon)}
	}
	t.Fatal("no free part of 127.0.0.0/8")
	return nil
}

func (w *world) addr(dc, host int) string { return fmt.Sprintf("127.%d.%d.%d", w.n, dc, host) }

func (w *world) at(dc, host, port int) string {
	return net.JoinHostPort(w.addr(dc, host), fmt.Sprint(port))
}

// gatewayOf is a wanfed.MeshGatewayResolver: a native server dials the gateway of
// its own datacenter.
func (w *world) gatewayOf(dc int) func(string) string {
	return func(string) string { return w.at(dc, 9, tlsPort) }
}

// startGateways starts the gateways of datacenters, each of which knows the others.
func (w *world) startGateways(dcs ...int) {
	w.t.Helper()
	for _, dc := range dcs {
		var b strings.Builder
		fmt.Fprintf(&b, "datacenter = \"dc%d\"\nnode = \"gw%d\"\nlisten { address = %q }\nadmin { address = %q }\n",
			dc, dc, w.at(dc, 9, tlsPort), w.at(dc, 9, 7440))
		if dc == 1 {
			fmt.Fprintf(&b, "sidecar \"alice\" { address = %q }\n", w.at(1, 11, tlsPort))
		} else {
			fmt.Fprintf(&b, "sidecar %q { address = %q }\n", w.node(dc), w.at(dc, 11, rpcPort))
		}
		for _, other := range dcs {
			if other != dc {
				fmt.Fprintf(&b, "datacenter \"dc%d\" { gateways = [%q] }\n", other, w.at(other, 9, tlsPort))
			}
		}
		b.WriteString("log {\n  level = \"debug\"\n  format = \"json\"\n}\n")
		w.gateway[dc] = start(w.t, fmt.Sprintf("gateway-dc%d", dc), w.at(dc, 9, 7440), "gateway", b.String())
	}
}

// node is the native server of a datacenter, called as in Consul's
// TestServer_JoinWAN_viaMeshGateway unless the test has another name for it.
func (w *world) node(dc int) string {
	if name, ok := w.nodes[dc]; ok {
		return name
	}
	return map[int]string{2: "betty", 3: "bonnie"}[dc]
}

// startSidecar starts alice's sidecar, with the peers of datacenters behind her
// gateway.
func (w *world) startSidecar(dcs ...int) {
	w.t.Helper()
	w.sidecar = start(w.t, "sidecar", w.at(1, 11, 7440), "sidecar", w.sidecarConfig(w.pki.server("dc1", "alice"), dcs...))
}

func (w *world) sidecarConfig(c cert, dcs ...int) string {
	w.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `datacenter = "dc1"
node = "alice"
server {
  profile   = "consul"
  address   = %q
  advertise = %q
}
listen { address = %q }
admin { address = %q }
tls {
  ca_file   = %q
  cert_file = %q
  key_file  = %q
}
gateways = [%q]
log {
  level  = "debug"
  format = "json"
}
`, w.addr(1, 11), w.addr(1, 1), w.at(1, 11, tlsPort), w.at(1, 11, 7440), c.ca, c.cert, c.key, w.at(1, 9, tlsPort))
	for _, dc := range dcs {
		fmt.Fprintf(&b, "peer %q {\n  datacenter = \"dc%d\"\n  advertise  = %q\n}\n", w.node(dc), dc, w.addr(dc, 1))
	}
	return b.String()
}

// A cert is a certificate and its CA, in files.
type cert struct{ ca, cert, key string }

// certFiles names the files of one certificate in a folder.
func certFiles(dir, name string) (certFile, keyFile string) {
	return filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
}

// eventually calls f until it returns nil.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Since(began) > deadline {
			t.Fatalf("not within %v: %v", deadline, err)
		}
		<-tick.C
	}
}
