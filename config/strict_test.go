package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// One mistake is one fault: the right one, at its place, and nothing that
// merely follows from it.
func TestOneMistakeIsOneFault(t *testing.T) {
	service := func(lines string) string {
		return goodSidecar + "service \"p\" {\n  kind = \"packet\"\n  port = 1\n  " + lines + "\n}\n"
	}
	gateways := `gateways = ["10.71.0.1", "gw.dc1.example:9443"]`
	first := `"10.71.0.1"`
	long := strings.Repeat("abcdefghi.", 12) + "a" // two of these and .server.dc1. are one too many
	for name, c := range map[string]struct{ text, want string }{
		// What is empty is not there.
		"empty datacenter":      {change(t, `"dc1"`, `""`), `:1:14: datacenter is empty; write datacenter = "dc1"`},
		"empty node":            {change(t, `"alice"`, `""`), `:2:14: node is empty`},
		"empty variable":        {change(t, `"alice"`, `env("EMPTY")`), `:2:14: node is empty`},
		"empty domain":          {goodSidecar + "domain = \"\"\n", `domain "" is empty`},
		"empty peer":            {change(t, `peer "amy"`, `peer ""`), `:10:6: peer "" is empty`},
		"empty peer datacenter": {change(t, `"dc2"`, `""`), `:16:16: datacenter in peer "bob.rack1" is empty`},
		"empty service":         {goodSidecar + "service \"\" {\n  kind = \"packet\"\n  port = 1\n}\n", `service name "" is not allowed`},
		"empty file name":       {change(t, `"/ca.pem"`, `""`), `ca_file in tls is empty`},
		"empty local":           {service(`local = ""`), `local in service "p" is "", which is no address and port`},
		"empty alpn":            {service(`alpn = ""`), `it is empty`},
		"empty listen address":  {change(t, `listen { address = "10.71.0.11" }`, `listen { address = "" }`), `address in listen is "": the host is empty`},

		// Nothing is converted in silence, and what is faulty has no followers.
		"number for env":      {change(t, `"alice"`, `env(5)`), `the name must be a string`},
		"not of a string":     {change(t, `"serf"`, "\"serf\"\n  hairpin = !\"true\""), `hairpin is an expression`},
		"minus of a string":   {service(`port = -"1"`), ``},
		"number in text":      {change(t, `"alice"`, `"a${5}"`), `:2:18: node is an expression`},
		"null":                {change(t, `"alice"`, `null`), `node is null, want a string`},
		"unquoted":            {change(t, `"alice"`, `alice`), `node is an expression; write "alice", in quotes`},
		"number for address":  {change(t, `listen { address = "10.71.0.11" }`, `listen { address = 5 }`), `address in listen is a number, want a string`},
		"number for domain":   {goodSidecar + "domain = 5\n", `domain is a number, want a string`},
		"text for gateways":   {change(t, gateways, `gateways = "10.71.0.1"`), `gateways is not a list of strings`},
		"a faulty gateway":    {change(t, gateways, `gateways = ["x y"]`), `the host has the character ' '`},
		"unknown profile":     {change(t, `"serf"`, `"surf"`) + "service \"gossip-packet\" { port = 1 }\n", `profile in server is "surf"; did you mean "serf"?`},
		"datacenter unnamed":  {goodSidecar + "datacenter {}\n", `datacenter has no label`},
		"two kinds that fail": {goodSidecar + "service \"p\" {\n  kind = \"x\"\n  port = 1\n}\n", `kind in service "p" is "x"; one of packet, stream`},
		"service twice": {
			goodSidecar + "service \"gossip-packet\" { port = 1 }\nservice \"gossip-packet\" { port = 2 }\n",
			`:26:9: service "gossip-packet" is given twice, first on line 25`,
		},

		// Addresses that cannot be dialled or told apart.
		"gateway on all":       {change(t, first, `"0.0.0.0:8443"`), `it stands for every address`},
		"gateway on port 0":    {change(t, first, `"10.71.0.1:0"`), `the port "0" is not a number from 1 to 65535`},
		"gateway half bracket": {change(t, first, `"[::1"`), `a bracket is missing`},
		"gateway twice":        {change(t, first, `"[::2]", "[0::2]:8443"`), `the gateway [::2]:8443 is given twice`},
		"passthrough":          {change(t, `listen { address = "10.71.0.11" }`, "listen {\n  address = \"10.71.0.11\"\n  passthrough = \"127.0.0.1\"\n}"), `passthrough in listen is "127.0.0.1": it has no port`},
		"multicast":            {change(t, `"127.77.2.1"`, `"224.0.0.1"`), `which stands for a group`},
		"where the server is":  {change(t, `"127.77.2.1"`, `"10.71.0.11"`), `where this server listens itself (10.71.0.11:7946)`},
		"advertise on all":     {change(t, `"127.77.1.1"`, `"0.0.0.0"`), `advertise in server is 0.0.0.0, which stands for every address`},
		"name too long":        {change(t, `"alice"`, `"`+long+`"`) + `domain = "` + long + "\"\n", `has 254 characters; at most 253 are allowed`},
		"reserved alpn":        {service(`alpn = "culvert/"`), `culvert/ names are Culvert's own`},
	} {
		if c.want == "" { // refused before this test's service can have two ports
			c = struct{ text, want string }{strings.Replace(c.text, "  port = 1\n", "", 1), `port is an expression`}
		}
		_, err := LoadSidecar(write(t, c.text), options())
		faults, ok := errors.AsType[Faults](err)
		if !ok || len(faults) != 1 || !strings.Contains(faults.Error(), c.want) {
			t.Errorf("%s: %v\nwant one fault, %s", name, err, c.want)
		}
	}
}

// A free port and every address are for listening.
func TestListenersMayBeWild(t *testing.T) {
	text := change(t, `listen { address = "10.71.0.11" }`, `listen { address = "[::]:0" }`) + "admin { address = \"0.0.0.0\" }\n"
	s, err := LoadSidecar(write(t, text), options())
	if err != nil || s.Listen.Address != "[::]:0" || s.Admin.Address != "0.0.0.0:7440" {
		t.Errorf("%+v, %v", s, err)
	}
}

// A number is told as it was written: 1e3000000 has three million digits.
func TestHugeNumber(t *testing.T) {
	start := time.Now()
	_, err := LoadSidecar(write(t, goodSidecar+"service \"p\" {\n  kind = \"packet\"\n  port = 1e3000000\n}\n"), options())
	if err == nil || !strings.Contains(err.Error(), `port in service "p" is 1e3000000; a whole number`) || len(err.Error()) > 300 {
		t.Errorf("got %.300v", err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("took %v", d)
	}
}

// A device has no size: what is read is bounded all the same.
func TestFileIsBounded(t *testing.T) {
	_, err := KindOf("/dev/zero")
	if err == nil || !strings.Contains(err.Error(), "more than 16777216 bytes") {
		t.Errorf("got %.300v", err)
	}
	if _, err := KindOf(t.TempDir()); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a folder: %v", err)
	}
}

// A file whose name looks like a flag keeps its places.
func TestFileNamedLikeAFlag(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("--c.hcl", []byte(strings.Replace(goodSidecar, `"alice"`, `""`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSidecar("--c.hcl", options()); err == nil || !strings.HasPrefix(err.Error(), "--c.hcl:2:14: ") {
		t.Errorf("got %v", err)
	}
}

// A flag wins, and what is wrong in the file is told nevertheless.
func TestFlagsHideNothing(t *testing.T) {
	o := options()
	o.Overrides.Listen = "127.0.0.1:1"
	_, err := LoadSidecar(write(t, change(t, `listen { address = "10.71.0.11" }`, `listen { address = "x:y" }`)), o)
	if err == nil || !strings.Contains(err.Error(), `address in listen is "x:y"`) {
		t.Errorf("got %v", err)
	}
}

func TestGatewayIsStrictToo(t *testing.T) {
	without := strings.Replace(goodGateway, `node       = "${hostname()}"`, "", 1)
	nobody, shouting := options(), options()
	nobody.Hostname = nil
	shouting.Hostname = func() (string, error) { return "GW1", nil }
	broken := options()
	broken.Hostname = func() (string, error) { return "", errors.New("no name") }
	foreign := strings.Replace(goodGateway, `["consul", "nomad"]`, `["vault", "nomad"]`, 1)
	for name, c := range map[string]struct {
		text string
		o    Options
		want string
	}{
		"no host's name":       {without, nobody, `node is missing, and the host's name "" is not known; add node = "gw1"`},
		"failing host's name":  {without, broken, `the host's name "" is not known`},
		"host's name in caps":  {without, shouting, `the host's name "GW1" has the capital letter 'G'`},
		"a choice of domains":  {foreign, options(), `domain is missing in sidecar "alice", and domains lacks this gateway's own, "consul"; add domain = "vault"`},
		"empty sidecar label":  {strings.Replace(goodGateway, `sidecar "alice"`, `sidecar ""`, 1), options(), `sidecar "" is empty`},
		"domains no list":      {strings.Replace(goodGateway, `["consul", "nomad"]`, `"consul"`, 1), options(), `domains is not a list of strings`},
		"sidecar on all":       {strings.Replace(goodGateway, `"10.71.0.11"`, `"0.0.0.0"`, 1), options(), `it stands for every address`},
		"wrong type of domain": {strings.Replace(goodGateway, `domain  = "nomad"`, `domain  = 1`, 1), options(), `domain in sidecar "amy" is a number`},
	} {
		_, err := LoadGateway(write(t, c.text), c.o)
		faults, ok := errors.AsType[Faults](err)
		if !ok || len(faults) != 1 || !strings.Contains(faults.Error(), c.want) {
			t.Errorf("%s: %v\nwant one fault, %s", name, err, c.want)
		}
	}
	one := strings.Replace(strings.Replace(goodGateway, `["consul", "nomad"]`, `["nomad"]`, 1), `  domain  = "nomad"`, "", 1)
	g, err := LoadGateway(write(t, one), options())
	if err != nil || g.Sidecars[0].Domain != "nomad" {
		t.Errorf("one domain leaves no choice: %+v, %v", g, err)
	}
}

// A problem of a field that tls has not stands at the block.
func TestTLSProblemOfNoField(t *testing.T) {
	o := options()
	o.CheckTLS = func(_, _, _, _, _, _, _ string) []TLSProblem { return []TLSProblem{{Summary: "odd"}} }
	file := write(t, goodSidecar)
	if _, err := LoadSidecar(file, o); err == nil || err.Error() != file+":20:1: odd" {
		t.Errorf("got %v in %s", err, filepath.Base(file))
	}
}
