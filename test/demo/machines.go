package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// A machine of the federation form has a host of its own: for a server with its
// sidecar, or for a gateway.
type machine struct {
	*host
	dc        int
	node      string
	gateway   bool
	lan       string // its address in its datacenter's network
	wan       string // a gateway's address between the datacenters
	advertise string // a server's address in all datacenters
	received  string // the file that a server's event handler writes
	client    *http.Client
	processes map[string]*process // gateway; sidecar, agent
}

const (
	adminAddress = "127.0.0.1:7440"
	rpcAddress   = "127.0.0.1:7373"
	primaryWAN   = "203.0.113.1:8443" // of the primary's gateway
	primaryLAN   = "10.71.0.11:8443"  // of the primary's sidecar
)

func (m *machine) datacenter() string { return fmt.Sprintf("dc%d", m.dc) }
func (m *machine) key() string        { return m.datacenter() + "/" + m.node }
func (m *machine) agent() agent       { return agent{m.host, rpcAddress} }

// kind is what culvert is on it: the command, and a part of its files' names.
func (m *machine) kind() string {
	if m.gateway {
		return "gateway"
	}
	return "sidecar"
}

func (m *machine) file(part string) string { return m.datacenter() + "-" + m.node + "-" + part }

// addMachine makes the nth server of a datacenter, or its gateway.
func (f *federation) addMachine(dc, n int, node string) (*machine, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	m := &machine{host: h, dc: dc, node: node, client: h.client(), processes: make(map[string]*process)}
	if n == 0 {
		m.gateway, m.lan, m.wan = true, fmt.Sprintf("10.%d.0.1", 70+dc), fmt.Sprintf("203.0.113.%d", dc)
	} else {
		m.lan, m.advertise = fmt.Sprintf("10.%d.0.%d", 70+dc, 10+n), fmt.Sprintf("127.77.%d.%d", dc, n)
		m.received = filepath.Join(f.dir, node+".event")
	}
	f.machines = append(f.machines, m)
	return m, nil
}

// wire connects all hosts. As between real datacenters, servers have a way to the
// gateways' addresses, and none to servers elsewhere.
func (f *federation) wire(ctx context.Context) error {
	links := []string{"link add switch type bridge", "link set switch up"}
	for i, m := range f.machines {
		links = append(links, fmt.Sprintf("link add name port%d type veth peer name eth0 netns %s", i, m.path),
			fmt.Sprintf("link set port%d master switch up", i))
	}
	if err := f.ip(ctx, nil, links...); err != nil {
		return err
	}
	for _, m := range f.machines {
		up := []string{"link set lo up", "link set eth0 up", "addr add " + m.lan + "/24 dev eth0"}
		if m.gateway {
			up = append(up, "addr add "+m.wan+"/24 dev eth0", "route add 10.0.0.0/8 dev eth0") // who dials it is answered
		} else {
			up = append(up, "route add 203.0.113.0/24 dev eth0")
		}
		if err := f.ip(ctx, m.host, up...); err != nil {
			return err
		}
	}
	return f.apart(ctx)
}

// apart makes sure that a server of one datacenter has no way to one of another.
func (f *federation) apart(ctx context.Context) error {
	return f.server("alice").failsToDial(ctx, f.server("bob").lan+":8443", syscall.ENETUNREACH)
}

// failsToDial makes sure that a connection comes to nothing in the way that is
// wanted.
func (m *machine) failsToDial(ctx context.Context, address string, want syscall.Errno) error {
	c, err := m.dial(ctx, "tcp", address)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("%s reaches %s", m.key(), address)
	}
	if !errors.Is(err, want) {
		return fmt.Errorf("%s is to be told %q: %w", m.key(), want.Error(), err)
	}
	return nil
}

// ip runs commands of ip(8) on a host.
func (f *federation) ip(ctx context.Context, on *host, commands ...string) error {
	file := filepath.Join(f.dir, "ip.batch")
	if err := os.WriteFile(file, []byte(strings.Join(commands, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	_, err := command(ctx, on, f.dir, "ip", "-batch", file)
	return err
}

func (f *federation) certificates(ctx context.Context) error {
	if err := f.culvert(ctx, f.dir, "tls", "ca", "create"); err != nil {
		return err
	}
	for _, m := range f.machines {
		ca := f.certificatesOf(m)
		if ca != f.dir { // of a CA that nobody else knows
			if err := os.Mkdir(ca, 0o700); err != nil {
				return err
			}
			if err := f.culvert(ctx, ca, "tls", "ca", "create"); err != nil {
				return err
			}
		}
		if err := f.culvert(ctx, ca, "tls", "cert", "create", "--"+m.role(), "--dc", m.datacenter(), "--node", m.node); err != nil {
			return err
		}
	}
	return nil
}

func (m *machine) role() string {
	if m.gateway {
		return "gateway"
	}
	return "server"
}

func (f *federation) certificatesOf(m *machine) string {
	if f.o.spoil == "cert" && m.node == "bob" {
		return filepath.Join(f.dir, "other")
	}
	return f.dir
}

// block is a machine's federation block: all that it is told of the others.
func (m *machine) block() string {
	lines := []string{`primary_datacenter = "dc1"`}
	switch {
	case m.dc > 1:
		lines = append(lines, fmt.Sprintf("primary_gateways   = [%q]", primaryWAN))
	case m.gateway:
		lines = append(lines, fmt.Sprintf("retry_join         = [%q]", primaryLAN))
	default:
		lines = append(lines, "bootstrap_expect   = 1")
	}
	if m.gateway {
		lines = append(lines, fmt.Sprintf("address            = %q", m.lan+":8443"), fmt.Sprintf("wan_address        = %q", m.wan+":8443"))
	}
	lines = append(lines, fmt.Sprintf("data_dir           = %q", m.file("state")))
	return "federation {\n  " + strings.Join(lines, "\n  ") + "\n}\n"
}

func (f *federation) configure(ctx context.Context) error {
	var files []string
	for _, m := range f.machines {
		certificate := filepath.Join(f.certificatesOf(m), fmt.Sprintf("%s-%s-consul-%s", m.datacenter(), m.role(), m.node))
		text := fmt.Sprintf(tlsConfig, m.datacenter(), m.node, f.certificatesOf(m), certificate, certificate)
		if m.gateway {
			text += "listen { address = \"0.0.0.0:8443\" }\n\n"
		} else {
			advertise := m.advertise
			if f.o.spoil == "record" && m.node == "dave" {
				advertise = f.server("bob").advertise
			}
			text += fmt.Sprintf(serverConfig, m.lan, advertise, m.lan)
			config := fmt.Sprintf(agentConfig, m.node, m.lan, m.advertise, rpcAddress, eventName, m.received, queryName, m.node)
			if err := os.WriteFile(filepath.Join(f.dir, m.file("agent.json")), []byte(config), 0o600); err != nil {
				return err
			}
		}
		files = append(files, m.file(m.kind()+".hcl"))
		if err := os.WriteFile(filepath.Join(f.dir, files[len(files)-1]), []byte(text+m.block()), 0o600); err != nil {
			return err
		}
	}
	return f.culvert(ctx, f.dir, append([]string{"validate"}, files...)...)
}

const tlsConfig = `datacenter = %q
node       = %q

tls {
  ca_file   = "%s/consul-ca.pem"
  cert_file = "%s.pem"
  key_file  = "%s-key.pem"
}

log {
  level  = "debug"
  format = "console"
}

`

const serverConfig = `server {
  profile   = "serf"
  address   = %q
  advertise = %q
}

listen { address = "%s:8443" }

`
