package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// options are those of the tests: an environment and a host of their own.
func options() Options {
	return Options{
		Env: func(name string) (string, bool) {
			v, ok := map[string]string{"DC": "dc1", "EMPTY": ""}[name]
			return v, ok
		},
		Hostname: func() (string, error) { return "gw7", nil },
	}
}

func write(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "c.hcl")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

const tlsBlock = `
tls {
  ca_file   = "/ca.pem"
  cert_file = "/alice.pem"
  key_file  = "/alice-key.pem"
}
`

const goodSidecar = `datacenter = "dc1"
node       = "alice"
server {
  profile   = "serf"
  address   = "10.71.0.11"
  advertise = "127.77.1.1"
}
listen { address = "10.71.0.11" }
gateways = ["10.71.0.1", "gw.dc1.example:9443"]
peer "amy" {
  datacenter = "dc1"
  advertise  = "127.77.1.2"
  address    = "10.71.0.12"
}
peer "bob.rack1" {
  datacenter = "dc2"
  advertise  = "127.77.2.1"
}
` + tlsBlock

const redirectSidecar = `datacenter = "dc1"
node       = "alice"
server {
  profile = "serf"
  address = "10.71.0.11"
}
capture  = "redirect"
on_exit  = "open"
listen { address = "10.71.0.11:8443" }
gateways = ["10.71.0.1"]
peer "amy" {
  datacenter = "dc1"
  advertise  = "10.71.0.12"
}
peer "bob" {
  datacenter = "dc2"
  advertise  = "10.72.0.11"
}
` + tlsBlock

const goodGateway = `datacenter = env("DC")
node       = "${hostname()}"
listen { address = "0.0.0.0:8443" }
domains = ["consul", "nomad"]
sidecar "alice" { address = "10.71.0.11" }
sidecar "amy" {
  address = "10.71.0.12:9443"
  domain  = "nomad"
}
datacenter "dc2" { gateways = ["203.0.113.7"] }
`

// With redirect servers have their real addresses, and siblings need no sidecar.
func TestRedirect(t *testing.T) {
	s, err := LoadSidecar(write(t, redirectSidecar), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Capture != CaptureRedirect || s.OnExit != OnExitOpen || s.Server.Advertise.String() != "10.71.0.11" || len(s.Peers) != 2 {
		t.Errorf("read %+v", s)
	}
}

func TestSidecarDefaults(t *testing.T) {
	got, err := LoadSidecar(write(t, goodSidecar), options())
	if err != nil {
		t.Fatal(err)
	}
	local := netip.MustParseAddrPort("10.71.0.11:7946")
	want := &Sidecar{
		Datacenter: "dc1", Node: "alice", Domain: "consul",
		Server: Server{Profile: "serf", Address: local.Addr(), Advertise: netip.MustParseAddr("127.77.1.1"), Hairpin: true},
		Services: []Service{
			{Name: "gossip-packet", Kind: "packet", Port: 7946, Local: local, ALPN: "consul/wan-gossip/packet"},
			{Name: "gossip-stream", Kind: "stream", Port: 7946, Local: local, ALPN: "consul/wan-gossip/stream"},
		},
		Capture: "bind", OnExit: "block",
		Listen:   Listen{Address: "10.71.0.11:8443"},
		TLS:      TLS{"/ca.pem", "/alice.pem", "/alice-key.pem"},
		Gateways: []string{"10.71.0.1:8443", "gw.dc1.example:9443"},
		Peers: []Peer{
			{Datacenter: "dc1", Node: "amy", Advertise: netip.MustParseAddr("127.77.1.2"), Address: "10.71.0.12:8443"},
			{Datacenter: "dc2", Node: "bob.rack1", Advertise: netip.MustParseAddr("127.77.2.1")},
		},
		Datacenters: []Datacenter{{Name: "dc2", Mode: "local"}},
		Admin:       Admin{Address: "127.0.0.1:7440"},
		Log:         Log{Level: "info"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}

func TestGatewayDefaults(t *testing.T) {
	got, err := LoadGateway(write(t, goodGateway), options())
	if err != nil {
		t.Fatal(err)
	}
	want := &Gateway{
		Datacenter: "dc1", Node: "gw7", Domain: "consul", Domains: []string{"consul", "nomad"},
		Listen: Listen{Address: "0.0.0.0:8443"},
		Sidecars: []GatewaySidecar{
			{Node: "alice", Address: "10.71.0.11:8443", Domain: "consul"}, {Node: "amy", Address: "10.71.0.12:9443", Domain: "nomad"},
		},
		Datacenters: []Datacenter{{Name: "dc2", Gateways: []string{"203.0.113.7:8443"}}},
		Admin:       Admin{Address: "127.0.0.1:7440"}, Log: Log{Level: "info"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
	short, err := LoadGateway(write(t, `datacenter = "dc1"
listen { address = ":8443" }`), options())
	if err == nil {
		t.Errorf("a listener without a host was accepted: %+v", short)
	}
	if kind, err := KindOf(write(t, goodGateway)); err != nil || kind != KindGateway {
		t.Errorf("kind %q, %v", kind, err)
	}
	if kind, err := KindOf(write(t, goodSidecar)); err != nil || kind != KindSidecar {
		t.Errorf("kind %q, %v", kind, err)
	}
}

func TestProfilesAndMerging(t *testing.T) {
	file := write(t, strings.Replace(goodSidecar, `"serf"`, `"consul"`, 1)+`
service "gossip-packet" { local = "127.0.0.1:9302" }
service "rpc" { alpn = "x/rpc" }
service "extra" {
  kind = "stream"
  port = 9000
}
`)
	s, err := LoadSidecar(file, options())
	if err != nil {
		t.Fatal(err)
	}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(s.Server.Address, port) }
	want := []Service{
		{"gossip-packet", "packet", 8302, netip.MustParseAddrPort("127.0.0.1:9302"), "consul/wan-gossip/packet", false},
		{"gossip-stream", "stream", 8302, at(8302), "consul/wan-gossip/stream", false},
		{"rpc", "stream", 8300, at(8300), "x/rpc", false},
		{"extra", "stream", 9000, at(9000), "", false},
	}
	if !slices.Equal(s.Services, want) {
		t.Errorf("services %+v, want %+v", s.Services, want)
	}
	nomad, err := LoadSidecar(write(t, strings.Replace(goodSidecar, `"serf"`, `"nomad"`, 1)), options())
	if err != nil || nomad.Domain != "nomad" || nomad.Services[0].Port != 4648 || nomad.Services[2].Port != 4647 {
		t.Errorf("nomad: %+v, %v", nomad, err)
	}
}

// Consul's RPC port has type bytes, unless one name stands for all of it.
func TestTypes(t *testing.T) {
	consul := strings.Replace(goodSidecar, `"serf"`, `"consul"`, 1)
	for text, want := range map[string]bool{
		consul: true,
		consul + "service \"rpc\" { port = 9300 }\n":         true,
		consul + "service \"rpc\" { alpn = \"x/rpc\" }\n":    false,
		strings.Replace(goodSidecar, `"serf"`, `"nomad"`, 1): false,
	} {
		s, err := LoadSidecar(write(t, text), options())
		if err != nil {
			t.Fatal(err)
		}
		for _, sv := range s.Services {
			if sv.Types != (want && sv.Name == "rpc") {
				t.Errorf("%s of profile %s: types %t", sv.Name, s.Server.Profile, sv.Types)
			}
		}
	}
	with := strings.Replace(consul, `profile   = "consul"`, "profile   = \"consul\"\n  tls = true", 1)
	with = strings.Replace(with, `listen { address = "10.71.0.11" }`,
		"listen {\n  address = \"10.71.0.11\"\n  passthrough = \"127.0.0.1:8300\"\n  passthrough_tls = true\n}", 1)
	s, err := LoadSidecar(write(t, with), options())
	if err != nil || !s.Server.TLS || !s.Listen.PassthroughTLS {
		t.Errorf("read %+v, %v", s, err)
	}
}

func TestModesByDefault(t *testing.T) {
	bob := "peer \"bob.rack1\" {\n  datacenter = \"dc2\"\n  advertise  = \"127.77.2.1\"\n"
	noGateways := strings.Replace(goodSidecar, "gateways = [\"10.71.0.1\", \"gw.dc1.example:9443\"]\n", "", 1)
	for want, text := range map[string]string{
		"local":  goodSidecar + `datacenter "dc2" { gateways = ["203.0.113.7"] }`,
		"remote": noGateways + `datacenter "dc2" { gateways = ["203.0.113.7"] }`,
		"direct": strings.Replace(noGateways, bob, bob+"  address = \"10.72.0.11\"\n", 1),
	} {
		s, err := LoadSidecar(write(t, text), options())
		if err != nil || len(s.Datacenters) != 1 || s.Datacenters[0].Mode != want {
			t.Errorf("want mode %s: %+v, %v", want, s, err)
		}
	}
}

func TestFlagsWin(t *testing.T) {
	o := options()
	o.Overrides = Overrides{Listen: "127.0.0.1:1234", Admin: "127.0.0.1", LogLevel: "debug", LogFormat: "json"}
	s, err := LoadSidecar(write(t, goodSidecar), o)
	if err != nil || s.Listen.Address != "127.0.0.1:1234" || s.Admin.Address != "127.0.0.1:7440" || s.Log != (Log{"debug", "json"}) {
		t.Errorf("%+v, %v", s, err)
	}
	o.Overrides = Overrides{Listen: "x:y", LogLevel: "loud"}
	_, err = LoadSidecar(write(t, goodSidecar), o)
	if err == nil || !strings.Contains(err.Error(), "--listen: ") || !strings.Contains(err.Error(), "--log-level: ") {
		t.Errorf("faults of flags: %v", err)
	}
}

// change replaces a part of the good sidecar's text, which must be there.
func change(t *testing.T, old, by string) string {
	t.Helper()
	if !strings.Contains(goodSidecar, old) {
		t.Fatalf("%q is not in the good configuration", old)
	}
	return strings.Replace(goodSidecar, old, by, 1)
}

// Each fault is told at its place, with what would be right.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":         {change(t, `node `, `nodde `), `:2:1: unknown key "nodde"; did you mean "node"?`},
		"unknown block":       {goodSidecar + "\npear \"x\" {}\n", `unknown block "pear"; did you mean "peer"?`},
		"key as a block":      {goodSidecar + "\ncapture {}\n", `unknown block "capture"; write capture = ...`},
		"block as a key":      {goodSidecar + "\nadmin = 1\n", `unknown key "admin"; write admin { ... }, without =`},
		"a number for text":   {change(t, `"alice"`, `5`), `:2:14: node is a number, want a string; write node = "..."`},
		"text for a number":   {goodSidecar + "service \"rpc\" {\n  kind = \"stream\"\n  port = \"8300\"\n}\n", `port in service "rpc" is a string, want a number`},
		"text for a bool":     {change(t, `profile   = "serf"`, "profile = \"serf\"\n  hairpin = \"true\""), `hairpin in server is a string, want true or false`},
		"an expression":       {change(t, `"alice"`, `"a" == "b"`), `node is an expression; values are literals, env("NAME") and hostname()`},
		"an unset variable":   {change(t, `"alice"`, `env("NOPE")`), `the environment variable NOPE is not set`},
		"a key twice":         {goodSidecar + "node = \"x\"\n", `attribute redefined`},
		"a syntax error":      {goodSidecar + "}\n", `argument or block definition required`},
		"no datacenter":       {change(t, `datacenter = "dc1"`, ``), `:1:1: datacenter is missing; add datacenter = "dc1"`},
		"no server":           {"datacenter = \"dc1\"\nnode = \"a\"\n" + tlsBlock, `the server block is missing`},
		"no listen":           {change(t, `listen { address = "10.71.0.11" }`, ``), `the listen block is missing`},
		"no tls":              {strings.Replace(goodSidecar, tlsBlock, "", 1), "the tls block is missing; `culvert tls cert create`"},
		"half a tls block":    {change(t, `  key_file  = "/alice-key.pem"`, ``), `key_file is missing in tls`},
		"a capital letter":    {change(t, `"alice"`, `"Alice"`), `node "Alice" has the capital letter 'A'`},
		"an underscore":       {change(t, `"dc2"`, `"dc_2"`), `datacenter "dc_2" has the character '_'`},
		"a dotted datacenter": {change(t, `"dc2"`, `"dc2.eu"`), `a datacenter is one DNS label, without dots`},
		"an address twice":    {change(t, `"127.77.2.1"`, `"127.77.1.2"`), `advertise in peer "bob.rack1" is 127.77.1.2, which is that of dc1/amy`},
		"own address":         {change(t, `"127.77.2.1"`, `"127.77.1.1"`), `which is that of this server itself`},
		"itself as a peer":    {change(t, `peer "amy"`, `peer "alice"`), `peer "alice" has this sidecar's own datacenter and name`},
		"a peer twice":        {goodSidecar + "peer \"amy\" {\n  datacenter = \"dc1\"\n  advertise = \"127.77.1.9\"\n  address = \"10.0.0.1\"\n}\n", `peer dc1/amy is given twice`},
		"two families":        {change(t, `"127.77.2.1"`, `"fd77::1"`), `IPv4 and IPv6`},
		"no IP address":       {change(t, `"127.77.2.1"`, `"bob.example"`), `advertise in peer "bob.rack1" is "bob.example", which is no IP address`},
		"tls without types":   {change(t, `profile   = "serf"`, "profile = \"serf\"\n  tls = true"), `tls in server is true, and no service has the type byte`},
		"passthrough_tls":     {change(t, `listen { address = "10.71.0.11" }`, "listen {\n  address = \"10.71.0.11\"\n  passthrough_tls = true\n}"), `passthrough_tls in listen is true, and passthrough is missing; add passthrough = "127.0.0.1:8300"`},
		"wildcard server":     {change(t, `"10.71.0.11"`, `"0.0.0.0"`), `address in server is 0.0.0.0, which stands for every address; bind the server to one address`},
		"no peer address":     {change(t, "  address    = \"10.71.0.12\"\n", ""), `peer "amy" is of this datacenter and has no address`},
		"nothing leads there": {change(t, "gateways = [\"10.71.0.1\", \"gw.dc1.example:9443\"]\n", ""), `nothing leads to peer "bob.rack1" of dc2`},
		"a gateway twice":     {change(t, `"gw.dc1.example:9443"`, `"10.71.0.1:8443"`), `the gateway 10.71.0.1:8443 is given twice`},
		"a bad port":          {change(t, `"gw.dc1.example:9443"`, `"gw:99999"`), `the port "99999" is not a number from 1 to 65535`},
		"a bad gateway":       {change(t, `"10.71.0.1"`, `"10.71.0.300"`), `10.71.0.300 is no IP address`},
		"a port in a list":    {change(t, `"10.71.0.1"`, `8443`), `an element of gateways is not a string`},
		"local without":       {change(t, "gateways = [\"10.71.0.1\", \"gw.dc1.example:9443\"]\n", "") + "datacenter \"dc2\" {\n  mode = \"local\"\n}\n", `mode in datacenter "dc2" is "local" and this datacenter has no gateways`},
		"remote without":      {goodSidecar + "datacenter \"dc2\" {\n  mode = \"remote\"\n}\n", `mode in datacenter "dc2" is "remote" and the block has no gateways`},
		"an unknown mode":     {goodSidecar + "datacenter \"dc2\" {\n  mode = \"locla\"\n}\n", `mode in datacenter "dc2" is "locla"; did you mean "local"?`},
		"own datacenter":      {goodSidecar + "datacenter \"dc1\" {}\n", `datacenter "dc1" is this sidecar's own`},
		"a service name":      {goodSidecar + "service \"A b\" {\n  kind = \"packet\"\n  port = 1\n}\n", `service name "A b" is not allowed`},
		"one port and kind":   {goodSidecar + "service \"p\" {\n  kind = \"packet\"\n  port = 7946\n}\n", `services "gossip-packet" and "p" have one port, 7946, and one kind, packet`},
		"no kind":             {goodSidecar + "service \"p\" {\n  port = 1\n}\n", `kind is missing in service "p"`},
		"port out of range":   {goodSidecar + "service \"p\" {\n  kind = \"packet\"\n  port = 70000\n}\n", `port in service "p" is 70000; a whole number from 1 to 65535`},
		"an alpn of ours":     {goodSidecar + "service \"p\" {\n  kind = \"packet\"\n  port = 1\n  alpn = \"culvert/x\"\n}\n", `culvert/ names are Culvert's own`},
		"an alpn twice":       {goodSidecar + "service \"p\" {\n  kind = \"packet\"\n  port = 1\n  alpn = \"consul/wan-gossip/packet\"\n}\n", `have one alpn, "consul/wan-gossip/packet"`},
		"redirect, virtual":   {goodSidecar + "capture = \"redirect\"\n", `advertise in peer "bob.rack1" is 127.77.2.1, and capture is "redirect": no server of another host has this address; give the peer's real address`},
		"redirect, no server": {strings.Replace(redirectSidecar, `address = "10.71.0.11"`, "", 1), `capture is "redirect" and the server's address is 127.0.0.1, which no peer can know; add address = "10.71.0.11"`},
		"redirect, port 0":    {strings.Replace(redirectSidecar, `"10.71.0.11:8443"`, `"10.71.0.11:0"`, 1), `capture is "redirect" and listen has port 0; give listen a port`},
		"redirect, wildcard":  {strings.Replace(redirectSidecar, `address = "10.71.0.11"`, `address = "0.0.0.0"`, 1), `bind the server to one address and name that, or use capture = "redirect" and name the one that it sends to its peers from`},
		"on_exit":             {goodSidecar + "on_exit = \"shut\"\n", `on_exit is "shut"; one of block, open`},
		"federation":          {goodSidecar + "federation {}\n", `primary_datacenter is missing in federation; add primary_datacenter = "dc1"`},
		"no label":            {goodSidecar + "peer {\n  datacenter = \"dc2\"\n  advertise = \"127.77.2.9\"\n}\n", `peer has no label`},
		"log level":           {goodSidecar + "log { level = \"infos\" }\n", `level in log is "infos"; did you mean "info"?`},
	} {
		_, err := LoadSidecar(write(t, c.text), options())
		faults, ok := errors.AsType[Faults](err)
		if !ok || !strings.Contains(faults.Error(), c.want) {
			t.Errorf("%s: %v\nwant %s", name, err, c.want)
			continue
		}
		for _, f := range faults {
			if f.Line == 0 || f.Column == 0 {
				t.Errorf("%s: a fault without a place: %v", name, f)
			}
		}
	}
}

// What is wrong inside a block too many, or one with a stray label, is told
// too.
func TestFaultsInsideFaultyBlocks(t *testing.T) {
	_, err := LoadSidecar(write(t, goodSidecar+"server {\n  adress = \"x\"\n}\n"), options())
	if err == nil || !strings.Contains(err.Error(), "server is given twice, first on line 3") || !strings.Contains(err.Error(), `unknown key "adress" in server; did you mean "address"?`) {
		t.Errorf("a second server block: %v", err)
	}
	_, err = LoadSidecar(write(t, change(t, `listen { address = "10.71.0.11" }`, "listen \"x\" {\n  adress = \"10.71.0.11\"\n}")), options())
	if err == nil || !strings.Contains(err.Error(), `listen has a label too many, "x"`) || !strings.Contains(err.Error(), `unknown key "adress" in listen`) {
		t.Errorf("a stray label: %v", err)
	}
}

func TestGatewayFaults(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"no gateways":    {`gateways = ["203.0.113.7"]`, ``, `datacenter "dc2" has no gateways`},
		"own datacenter": {`datacenter "dc2"`, `datacenter "dc1"`, `datacenter "dc1" is this gateway's own`},
		"unknown domain": {`domain  = "nomad"`, `domain  = "nomat"`, `domain in sidecar "amy" is "nomat"; did you mean "nomad"?`},
		"a sidecar twice": {
			"  domain  = \"nomad\"\n}", "  domain  = \"nomad\"\n}\nsidecar \"alice\" { address = \"10.0.0.9\" }",
			`sidecar "alice" of domain "consul" is given twice`,
		},
		"no address":  {`sidecar "alice" { address = "10.71.0.11" }`, `sidecar "alice" {}`, `address is missing in sidecar "alice"`},
		"passthrough": {`listen { address = "0.0.0.0:8443" }`, "listen {\n  address = \"0.0.0.0:8443\"\n  passthrough = \"127.0.0.1:1\"\n}", `unknown key "passthrough" in listen`},
		"federation":  {`domains =`, "federation {}\ndomains =", `primary_datacenter is missing in federation`},
	} {
		if !strings.Contains(goodGateway, c.old) {
			t.Fatalf("%s: %q is not in the good configuration", name, c.old)
		}
		_, err := LoadGateway(write(t, strings.Replace(goodGateway, c.old, c.new, 1)), options())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v\nwant %s", name, err, c.want)
		}
	}
}

func TestTLSFilesAreChecked(t *testing.T) {
	o := options()
	var asked []string
	o.CheckTLS = func(ca, cert, key, datacenter, node, domain, role string) []TLSProblem {
		asked = []string{ca, cert, key, datacenter, node, domain, role}
		return []TLSProblem{{Field: "key_file", Summary: "the key is readable by others", Hint: "chmod o= it"}}
	}
	file := write(t, strings.ReplaceAll(goodSidecar, `"/`, `"`))
	_, err := LoadSidecar(file, o)
	if want := file + ":23:15: the key is readable by others; chmod o= it"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	dir := filepath.Dir(file)
	want := []string{filepath.Join(dir, "ca.pem"), filepath.Join(dir, "alice.pem"), filepath.Join(dir, "alice-key.pem"), "dc1", "alice", "consul", "server"}
	if !slices.Equal(asked, want) {
		t.Errorf("asked for %q, want %q", asked, want)
	}
}

func TestFilesThatCannotBeRead(t *testing.T) {
	for _, load := range []func(string) error{
		func(f string) error { _, err := LoadSidecar(f, options()); return err },
		func(f string) error { _, err := LoadGateway(f, options()); return err },
		func(f string) error { _, err := KindOf(f); return err },
	} {
		err := load("/nowhere/c.hcl")
		faults, ok := errors.AsType[Faults](err)
		if !ok || faults.ExitCode() != 2 || !strings.HasPrefix(faults.Error(), "/nowhere/c.hcl: read the file: no such file") {
			t.Errorf("a missing file: %v", err)
		}
	}
}

func TestRestart(t *testing.T) {
	old, err := LoadSidecar(write(t, goodSidecar), options())
	if err != nil {
		t.Fatal(err)
	}
	now := *old
	now.Peers, now.Gateways, now.Datacenters = nil, nil, nil
	if got := Restart(old, &now); got != nil {
		t.Errorf("what changes live wants a restart: %v", got)
	}
	now.Node, now.Listen.Address = "amy", "x"
	if got := Restart(old, &now); !slices.Equal(got, []string{"node", "listen"}) {
		t.Errorf("restart wanted for %v", got)
	}
	g, err := LoadGateway(write(t, goodGateway), options())
	if err != nil {
		t.Fatal(err)
	}
	other := *g
	other.Sidecars, other.Domains = nil, nil
	if got := RestartGateway(g, &other); !slices.Equal(got, []string{"domains"}) {
		t.Errorf("restart wanted for %v", got)
	}
}

// Attributes and the decoder must not come apart: each attribute is one that
// the decoder asks for, and there are no others.
func TestAttributesAreTheDecoders(t *testing.T) {
	const federationBlock = "federation {\n  accept \"dc2\" {}\n}\n"
	everything := goodSidecar + "service \"x\" {\n}\ndatacenter \"dc2\" {}\nadmin {}\nlog {}\n" + federationBlock
	var got []string
	for kind, text := range map[Kind]string{KindSidecar: everything, KindGateway: goodGateway + tlsBlock + "admin {}\nlog {}\n" + federationBlock} {
		d, root, err := open(write(t, text), options())
		if err != nil {
			t.Fatal(err)
		}
		known := make(map[string]bool)
		d.asked = func(path string) { known[path] = true }
		if kind == KindSidecar {
			d.sidecar(root)
		} else {
			d.gateway(root)
		}
		for path := range known {
			got = append(got, string(kind)+": "+path)
		}
	}
	slices.Sort(got)
	if want := Attributes(); !slices.Equal(got, want) {
		t.Errorf("the decoder asks for\n%v\nAttributes has\n%v", got, want)
	}
}

func TestUsed(t *testing.T) {
	got, err := Used(write(t, goodGateway))
	want := []string{
		"gateway: datacenter", "gateway: datacenter.gateways", "gateway: domains", "gateway: listen.address", "gateway: node",
		"gateway: sidecar.address", "gateway: sidecar.domain",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}
