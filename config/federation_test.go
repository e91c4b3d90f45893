package config

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// aloneSidecar knows nobody: beside a federation block this is enough.
const aloneSidecar = `datacenter = "dc1"
node       = "alice"
server {
  profile   = "serf"
  address   = "10.71.0.11"
  advertise = "127.77.1.1"
}
listen { address = "0.0.0.0:9443" }
` + tlsBlock

// aloneGateway has a name and a certificate, and no routes.
const aloneGateway = `datacenter = "dc1"
node       = "gw1"
listen { address = "10.71.0.1" }
` + tlsBlock

const (
	ofOne = `federation {
  primary_datacenter = "dc1"
  data_dir           = ""
}
`
	ofThree = `federation {
  primary_datacenter = "dc1"
  bootstrap_expect   = 3
  retry_join         = ["10.71.0.12", "amos.dc1.example:9443"]
  data_dir           = "/var/lib/culvert"
  reap               = "90m"
  accept "dc2" {
    advertise = ["10.72.0.0/16", "fd72::/32"]
    gateways  = ["203.0.113.0/24", "198.51.100.7"]
  }
  accept "dc1" { advertise = ["10.71.0.0/16"] }
}
`
	ofSecondary = `federation {
  primary_datacenter = "dc0"
  primary_gateways   = ["gw.dc0.example", "srv:_gw._tcp.dc0.example"]
  data_dir           = "culvert"
}
`
	ofPrimaryGateway = `federation {
  primary_datacenter = "dc1"
  retry_join         = ["10.71.0.11", "10.71.0.12:9443"]
  data_dir           = "/var/lib/culvert"
  wan_address        = "gw.dc1.example"
}
`
)

func prefixes(t *testing.T, all ...string) []netip.Prefix {
	t.Helper()
	var out []netip.Prefix
	for _, s := range all {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestFederationOfSidecars(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want Federation
	}{
		"alone": {aloneSidecar + ofOne, Federation{PrimaryDatacenter: "dc1", BootstrapExpect: 1, Address: "10.71.0.11:9443", Reap: 72 * time.Hour}},
		"of three": {aloneSidecar + ofThree, Federation{
			PrimaryDatacenter: "dc1", BootstrapExpect: 3, RetryJoin: []string{"10.71.0.12:8443", "amos.dc1.example:9443"},
			DataDir: "/var/lib/culvert", Address: "10.71.0.11:9443", Reap: 90 * time.Minute,
			Accept: []Accept{
				{"dc2", prefixes(t, "10.72.0.0/16", "fd72::/32"), prefixes(t, "203.0.113.0/24", "198.51.100.7/32")},
				{"dc1", prefixes(t, "10.71.0.0/16"), nil},
			},
		}},
		"that only joins": {aloneSidecar + strings.Replace(ofThree, "= 3", "= 0", 1), Federation{
			PrimaryDatacenter: "dc1", RetryJoin: []string{"10.71.0.12:8443", "amos.dc1.example:9443"},
			DataDir: "/var/lib/culvert", Address: "10.71.0.11:9443", Reap: 90 * time.Minute,
			Accept: []Accept{
				{"dc2", prefixes(t, "10.72.0.0/16", "fd72::/32"), prefixes(t, "203.0.113.0/24", "198.51.100.7/32")},
				{"dc1", prefixes(t, "10.71.0.0/16"), nil},
			},
		}},
		"secondary": {aloneSidecar + ofSecondary, Federation{
			PrimaryDatacenter: "dc0", PrimaryGateways: []string{"gw.dc0.example:8443", "srv:_gw._tcp.dc0.example"}, DataDir: "culvert", Address: "10.71.0.11:9443",
		}},
		"secondary behind gateways": {
			`gateways = ["10.71.0.1"]` + "\n" + aloneSidecar + strings.Replace(ofOne, "dc1", "dc0", 1),
			Federation{PrimaryDatacenter: "dc0", Address: "10.71.0.11:9443"},
		},
		"on its own address": {
			strings.Replace(aloneSidecar, "0.0.0.0:9443", "127.0.0.1:8443", 1) + ofOne,
			Federation{PrimaryDatacenter: "dc1", BootstrapExpect: 1, Address: "127.0.0.1:8443", Reap: 72 * time.Hour},
		},
		"on its own name": {
			strings.Replace(aloneSidecar, "0.0.0.0:9443", "alice.dc1.example", 1) + ofOne,
			Federation{PrimaryDatacenter: "dc1", BootstrapExpect: 1, Address: "alice.dc1.example:8443", Reap: 72 * time.Hour},
		},
		"by another address": {
			strings.Replace(aloneSidecar, `address   = "10.71.0.11"`, "", 1) + strings.Replace(ofOne, "data_dir", "address = \"10.71.0.99\"\n  data_dir", 1),
			Federation{PrimaryDatacenter: "dc1", BootstrapExpect: 1, Address: "10.71.0.99:8443", Reap: 72 * time.Hour},
		},
	} {
		file := write(t, c.text)
		s, err := LoadSidecar(file, options())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.want.DataDir != "" && !filepath.IsAbs(c.want.DataDir) {
			c.want.DataDir = filepath.Join(filepath.Dir(file), c.want.DataDir)
		}
		if !reflect.DeepEqual(*s.Federation, c.want) {
			t.Errorf("%s: got\n%+v, want\n%+v", name, *s.Federation, c.want)
		}
	}
	if s, err := LoadSidecar(write(t, goodSidecar), options()); err != nil || s.Federation != nil {
		t.Errorf("without a block: %+v, %v", s, err)
	}
}

func TestFederationOfGateways(t *testing.T) {
	sidecar := "sidecar \"alice\" { address = \"10.71.0.11\" }\n"
	for name, c := range map[string]struct {
		text string
		want Federation
	}{
		"primary": {aloneGateway + ofPrimaryGateway, Federation{
			PrimaryDatacenter: "dc1", RetryJoin: []string{"10.71.0.11:8443", "10.71.0.12:9443"}, DataDir: "/var/lib/culvert",
			Address: "10.71.0.1:8443", WANAddress: "gw.dc1.example:8443",
		}},
		"primary with sidecar blocks": {aloneGateway + sidecar + ofOne, Federation{
			PrimaryDatacenter: "dc1", Address: "10.71.0.1:8443", WANAddress: "10.71.0.1:8443",
		}},
		"secondary": {aloneGateway + strings.Replace(ofSecondary, `"culvert"`, `"/x"`, 1), Federation{
			PrimaryDatacenter: "dc0", PrimaryGateways: []string{"gw.dc0.example:8443", "srv:_gw._tcp.dc0.example"}, DataDir: "/x",
			Address: "10.71.0.1:8443", WANAddress: "10.71.0.1:8443",
		}},
		"secondary with a route": {aloneGateway + `datacenter "dc0" { gateways = ["203.0.113.7"] }` + "\n" + strings.Replace(ofOne, "dc1", "dc0", 1), Federation{
			PrimaryDatacenter: "dc0", Address: "10.71.0.1:8443", WANAddress: "10.71.0.1:8443",
		}},
		"on every address": {
			strings.Replace(aloneGateway, "10.71.0.1", "[::]", 1) + sidecar + strings.Replace(ofOne, "data_dir", "address = \"gw1.lan\"\n  data_dir", 1),
			Federation{PrimaryDatacenter: "dc1", Address: "gw1.lan:8443", WANAddress: "gw1.lan:8443"},
		},
	} {
		g, err := LoadGateway(write(t, c.text), options())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !reflect.DeepEqual(*g.Federation, c.want) {
			t.Errorf("%s: got\n%+v, want\n%+v", name, *g.Federation, c.want)
		}
	}
}

// Records bring what the file leaves out: beside a federation block no peer
// lacks a way, and a mode that is not given is left to those who know more.
func TestFederationBringsWhatIsMissing(t *testing.T) {
	peers := `peer "amy" {
  datacenter = "dc1"
  advertise  = "127.77.1.2"
}
peer "bob" {
  datacenter = "dc2"
  advertise  = "127.77.2.1"
}
datacenter "dc3" {}
datacenter "dc4" { gateways = ["203.0.113.7"] }
datacenter "dc5" { mode = "local" }
datacenter "dc6" { mode = "remote" }
datacenter "dc7" { mode = "direct" }
`
	s, err := LoadSidecar(write(t, aloneSidecar+peers+ofOne), options())
	if err != nil {
		t.Fatal(err)
	}
	want := []Datacenter{
		{Name: "dc3"},
		{Name: "dc4", Gateways: []string{"203.0.113.7:8443"}},
		{Name: "dc5", Mode: "local"},
		{Name: "dc6", Mode: "remote"},
		{Name: "dc7", Mode: "direct"},
		{Name: "dc2"},
	}
	if len(s.Peers) != 2 || !reflect.DeepEqual(s.Datacenters, want) {
		t.Errorf("%d peers, datacenters %+v, want 2 and %+v", len(s.Peers), s.Datacenters, want)
	}
	// The same without the block lacks four things, so that it is the block
	// that makes the difference.
	_, err = LoadSidecar(write(t, aloneSidecar+peers), options())
	if faults, ok := errors.AsType[Faults](err); !ok || len(faults) != 4 {
		t.Errorf("without a federation block: %v\nwant four faults", err)
	}
}

// As many candidates as are expected, and not twice as many.
func TestCandidates(t *testing.T) {
	for _, c := range []struct {
		expect, others int
		own            string // this sidecar's own entry in the list
		want           string
	}{
		{expect: 3, others: 1, want: "bootstrap_expect in federation is 3, and there are 2 candidates, this sidecar and 1 more of retry_join; name 2 others in retry_join, or expect fewer"},
		{expect: 3, others: 1, own: "10.71.0.11:9443", want: "there are 2 candidates"},
		{expect: 3, others: 2},
		{expect: 3, others: 2, own: "10.71.0.11:9443"},
		{expect: 3, others: 4},
		{expect: 3, others: 4, own: "10.71.0.11:9443"},
		{expect: 3, others: 5, want: "is 3, and there are 6 candidates, this sidecar and 5 more of retry_join: two groups of 3 could begin a store each; name 4 others at most (this sidecar is known by 10.71.0.11:9443), or expect more"},
		{expect: 3, others: 4, own: "10.71.0.11:8443", want: "there are 6 candidates"}, // another port is another sidecar
		{expect: 5, others: 3, want: "there are 4 candidates"},
		{expect: 5, others: 4},
		{expect: 5, others: 8},
		{expect: 5, others: 9, want: "two groups of 5"},
		{expect: 7, others: 5, want: "there are 6 candidates"},
		{expect: 7, others: 12},
		{expect: 7, others: 13, want: "two groups of 7"},
		{expect: 0, others: 1},
		{expect: 0, others: 40},
		{expect: 0, others: 0, own: "10.71.0.11:9443", want: "bootstrap_expect in federation is 0, and retry_join names this sidecar alone: nobody to join"},
	} {
		var list []string
		if c.own != "" {
			list = append(list, c.own)
		}
		for i := range c.others {
			list = append(list, fmt.Sprintf("10.71.1.%d:9443", i+1))
		}
		text := aloneSidecar + fmt.Sprintf(`federation {
  primary_datacenter = "dc1"
  bootstrap_expect   = %d
  retry_join         = ["%s"]
  data_dir           = "/x"
}
`, c.expect, strings.Join(list, `", "`))
		_, err := LoadSidecar(write(t, text), options())
		faults, _ := errors.AsType[Faults](err)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%+v: %v", c, err)
		case c.want != "" && (len(faults) != 1 || faults[0].Line != 17 || !strings.Contains(faults.Error(), c.want)):
			t.Errorf("%+v: %v", c, err)
		}
	}
	// The address that others dial is this sidecar too, and so is its listener's.
	for _, own := range []string{"alice.dc1.example", "ALICE.dc1.example.:8443", "10.71.0.11:9443"} {
		text := strings.Replace(aloneSidecar, "0.0.0.0:", "10.71.0.11:", 1) + `federation {
  primary_datacenter = "dc1"
  bootstrap_expect   = 3
  retry_join         = ["` + own + `", "10.71.0.12"]
  address            = "alice.dc1.example"
  data_dir           = "/x"
}
`
		if _, err := LoadSidecar(write(t, text), options()); err == nil || !strings.Contains(err.Error(), "there are 2 candidates") {
			t.Errorf("%s: %v", own, err)
		}
	}
}

func TestRestartForFederation(t *testing.T) {
	load := func(text string) *Sidecar {
		s, err := LoadSidecar(write(t, text), options())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	old := load(aloneSidecar + ofThree)
	live := load(aloneSidecar + strings.NewReplacer(`"10.71.0.12"`, `"10.71.0.13"`, "fd72::/32", "fd73::/32").Replace(ofThree))
	if got := Restart(old, live); got != nil || reflect.DeepEqual(old.Federation, live.Federation) {
		t.Errorf("retry_join and accept want a restart: %v", got)
	}
	second := load(aloneSidecar + strings.Replace(ofSecondary, `"culvert"`, `""`, 1))
	moved := load(aloneSidecar + strings.NewReplacer(`"culvert"`, `""`, "gw.dc0", "gw2.dc0").Replace(ofSecondary))
	if got := Restart(second, moved); got != nil || reflect.DeepEqual(second.Federation, moved.Federation) {
		t.Errorf("primary_gateways want a restart: %v", got)
	}
	none := *old
	none.Federation = nil
	for name, pair := range map[string][2]*Sidecar{
		"the block comes": {&none, old},
		"the block goes":  {old, &none},
		"reap":            {old, load(aloneSidecar + strings.Replace(ofThree, "90m", "91m", 1))},
		"data_dir":        {old, load(aloneSidecar + strings.Replace(ofThree, "lib", "lab", 1))},
		"bootstrap":       {old, load(aloneSidecar + strings.Replace(ofThree, "= 3", "= 0", 1))},
		"the primary":     {old, second},
	} {
		if got := Restart(pair[0], pair[1]); !slices.Equal(got, []string{"federation"}) {
			t.Errorf("%s: restart wanted for %v", name, got)
		}
	}
	if old.Federation.RetryJoin == nil || old.Federation.Accept == nil {
		t.Error("what was compared has changed")
	}
	g, err := LoadGateway(write(t, aloneGateway+ofPrimaryGateway), options())
	if err != nil {
		t.Fatal(err)
	}
	other, f := *g, *g.Federation
	other.Federation, f.RetryJoin = &f, nil
	if got := RestartGateway(g, &other); got != nil {
		t.Errorf("retry_join of a gateway wants a restart: %v", got)
	}
	f.WANAddress = "x:1"
	if got := RestartGateway(g, &other); !slices.Equal(got, []string{"federation"}) {
		t.Errorf("restart of a gateway wanted for %v", got)
	}
}
