package config

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// A mistake is a change to what is well, and the one fault that tells it.
type mistake struct{ old, new, want string }

// faulty puts a mistake into a text.
func (m mistake) faulty(t *testing.T, name, text string) string {
	t.Helper()
	if strings.Count(text, m.old) != 1 {
		t.Fatalf("%s: %q is not once in the good configuration", name, m.old)
	}
	return strings.Replace(text, m.old, m.new, 1)
}

func (m mistake) check(t *testing.T, name string, err error) {
	t.Helper()
	faults, ok := errors.AsType[Faults](err)
	if !ok || len(faults) != 1 || !strings.Contains(faults.Error(), m.want) {
		t.Errorf("%s: %v\nwant one fault, %s", name, err, m.want)
		return
	}
	if f := faults[0]; f.Line == 0 || f.Column == 0 || f.Hint == "" {
		t.Errorf("%s: without place or hint: %+v", name, f)
	}
}

func sidecarMistakes(t *testing.T, text string, all map[string]mistake) {
	t.Helper()
	for name, m := range all {
		_, err := LoadSidecar(write(t, m.faulty(t, name, text)), options())
		m.check(t, name, err)
	}
}

func gatewayMistakes(t *testing.T, text string, all map[string]mistake) {
	t.Helper()
	for name, m := range all {
		_, err := LoadGateway(write(t, m.faulty(t, name, text)), options())
		m.check(t, name, err)
	}
}

const (
	primaryIs1 = `primary_datacenter = "dc1"`
	primaryIs0 = `primary_datacenter = "dc0"`
	retryJoin  = `["10.71.0.12", "amos.dc1.example:9443"]`
	gateways0  = `["gw.dc0.example", "srv:_gw._tcp.dc0.example"]`
)

func TestFederationFaultsOfThePrimary(t *testing.T) {
	sidecarMistakes(t, aloneSidecar+ofThree, map[string]mistake{
		"no primary":       {primaryIs1, "", `:15:1: primary_datacenter is missing in federation; add primary_datacenter = "dc1"`},
		"an empty primary": {primaryIs1, `primary_datacenter = ""`, `:16:24: primary_datacenter in federation is empty`},
		"primary in caps":  {primaryIs1, `primary_datacenter = "DC1"`, `:16:24: datacenter "DC1" has the capital letter`},
		"primary dotted":   {primaryIs1, `primary_datacenter = "dc1.eu"`, `a datacenter is one DNS label, without dots`},
		"own name in caps": {`datacenter = "dc1"` + "\nnode", `datacenter = "DC1"` + "\nnode", `:1:14: datacenter "DC1" has the capital letter`},
		"gateways of ours": {primaryIs1, primaryIs1 + "\n  primary_gateways = 5", `:17:3: primary_gateways in federation is for secondaries, and this datacenter is the primary; take it away: retry_join names`},
		"wan_address":      {primaryIs1, primaryIs1 + "\n  wan_address = \"x\"", `:17:3: unknown key "wan_address" in federation; it is a gateway's: what other datacenters dial`},
		"a mistyped key":   {"reap ", "reep ", `unknown key "reep" in federation; did you mean "reap"?`},
		"a label":          {"federation {", `federation "x" {`, `federation has a label too many, "x"`},

		"no expect":          {"bootstrap_expect   = 3", "", `:15:1: bootstrap_expect is missing in federation, and there is retry_join; add bootstrap_expect = 3`},
		"one, and others":    {"= 3", "= 1", `:17:24: bootstrap_expect in federation is 1, and there is retry_join: two sidecars could each begin a store of their own; write 0 to join`},
		"two":                {"= 3", "= 2", `bootstrap_expect in federation is 2, an even number; write 3: 2 voters survive no more failures than 1`},
		"four":               {"= 3", "= 4", `bootstrap_expect in federation is 4, an even number; write 5: 4 voters survive no more failures than 3`},
		"nine":               {"= 3", "= 9", `bootstrap_expect in federation is 9; one of 0 (only joins), 1 (alone), 3, 5 and 7`},
		"less than none":     {"= 3", "= -3", `bootstrap_expect in federation is -3; one of 0`},
		"a part":             {"= 3", "= 2.5", `bootstrap_expect in federation is 2.5; one of 0`},
		"expect as text":     {"= 3", `= "3"`, `bootstrap_expect in federation is a string, want a number; write bootstrap_expect = 3`},
		"three, no others":   {"retry_join         = " + retryJoin, "", `bootstrap_expect in federation is 3, and there is no retry_join; name the 2 others in retry_join, or write 1`},
		"three, empty list":  {retryJoin, "[]", `bootstrap_expect in federation is 3, and there is no retry_join`},
		"no list":            {retryJoin, `"10.71.0.12"`, `:18:24: retry_join in federation is not a list of strings`},
		"one other faulty":   {`"10.71.0.12"`, `"10.71.0.300"`, `:18:25: a sidecar in federation is "10.71.0.300": 10.71.0.300 is no IP address`},
		"all others faulty":  {retryJoin, `["x y"]`, `a sidecar in federation is "x y": the host has the character ' '`},
		"others twice":       {retryJoin, `["10.71.0.12", "10.71.0.13", "10.71.0.12:8443"]`, `:18:53: the sidecar 10.71.0.12:8443 is given twice in federation`},
		"a name twice":       {retryJoin, `["a.example.", "b", "A.example:8443"]`, `the sidecar A.example:8443 is given twice in federation`},
		"others everywhere":  {`"10.71.0.12"`, `"[::]:8443"`, `it stands for every address, and one is needed to dial`},
		"others everywhere4": {`"10.71.0.12"`, `"[::ffff:0.0.0.0]:8443"`, `it stands for every address, and one is needed to dial`},
		"others by SRV":      {`"10.71.0.12"`, `"srv:_x._tcp.dc1"`, `a sidecar in federation is "srv:_x._tcp.dc1": the port "_x._tcp.dc1" is not a number`},
		"memory only":        {`"/var/lib/culvert"`, `""`, `:19:24: data_dir in federation is "", which is memory only with more than one voter; give a folder that is kept`},
		"no data_dir":        {`data_dir           = "/var/lib/culvert"`, "", `:15:1: data_dir is missing in federation; add data_dir = "/var/lib/culvert", a folder that is kept, or data_dir = "" for memory alone`},
		"data_dir null":      {`"/var/lib/culvert"`, "null", `data_dir in federation is null, want a string`},

		"reap in days":    {`"90m"`, `"3d"`, `:20:24: reap in federation is "3d", which is no duration; write hours or minutes, such as reap = "72h" or "90m"`},
		"reap a number":   {`"90m"`, `72`, `reap in federation is a number, want a string; write reap = "72h"`},
		"reap at once":    {`"90m"`, `"9m59s"`, `reap in federation is "9m59s"; from "10m" to "8760h", such as reap = "72h"`},
		"reap never":      {`"90m"`, `"8760h1s"`, `reap in federation is "8760h1s"; from "10m"`},
		"reap before now": {`"90m"`, `"-72h"`, `reap in federation is "-72h"; from "10m"`},
		"reap empty":      {`"90m"`, `""`, `reap in federation is "", which is no duration`},
	})
	sidecarMistakes(t, aloneSidecar+strings.Replace(ofOne, `""`, `"/x"`, 1), map[string]mistake{
		"nobody to join": {primaryIs1, primaryIs1 + "\n  bootstrap_expect = 0\n  retry_join = []", `bootstrap_expect in federation is 0, and there is no retry_join: nobody to join; name sidecars of the store in retry_join, or write 1`},
	})
	for _, reap := range []string{"10m", "8760h", "1h30m"} {
		if _, err := LoadSidecar(write(t, aloneSidecar+strings.Replace(ofThree, "90m", reap, 1)), options()); err != nil {
			t.Errorf("reap %s: %v", reap, err)
		}
	}
}

// More than one voter in memory is told beside what else is wrong: 0 joins
// others, and where bootstrap_expect is missing there are some.
func TestMemoryIsForOneVoter(t *testing.T) {
	inMemory := strings.Replace(ofThree, `"/var/lib/culvert"`, `""`, 1)
	for name, c := range map[string]struct {
		text   string
		faults int
		memory bool
	}{
		"three":              {inMemory, 1, true},
		"only joins":         {strings.Replace(inMemory, "= 3", "= 0", 1), 1, true},
		"expect is missing":  {strings.Replace(inMemory, "bootstrap_expect   = 3", "", 1), 2, true},
		"expect is no digit": {strings.Replace(inMemory, "= 3", `= "3"`, 1), 1, false},
		"one":                {strings.Replace(inMemory, "= 3", "= 1", 1), 1, false},
		"alone":              {ofOne, 0, false},
	} {
		_, err := LoadSidecar(write(t, aloneSidecar+c.text), options())
		faults, _ := errors.AsType[Faults](err)
		if len(faults) != c.faults || strings.Contains(faults.Error(), "memory only") != c.memory {
			t.Errorf("%s: %v\nwant %d faults, memory among them: %t", name, err, c.faults, c.memory)
		}
	}
}

func TestFederationFaultsOfSecondaries(t *testing.T) {
	const notHere = " in federation is for the primary datacenter, which is dc0; take it away"
	sidecarMistakes(t, aloneSidecar+ofSecondary, map[string]mistake{
		"expect":           {primaryIs0, primaryIs0 + "\n  bootstrap_expect = 4", ":17:3: bootstrap_expect" + notHere},
		"retry_join":       {primaryIs0, primaryIs0 + "\n  retry_join = [\"x y\"]", ":17:3: retry_join" + notHere},
		"reap":             {primaryIs0, primaryIs0 + "\n  reap = \"soon\"", ":17:3: reap" + notHere},
		"no way":           {"primary_gateways   = " + gateways0, "", `:15:1: nothing leads to the primary datacenter, dc0; add primary_gateways = ["gw.dc0.example:8443"] to it, or gateways = ["10.71.0.1:8443"] at the top`},
		"an empty list":    {gateways0, "[]", `nothing leads to the primary datacenter, dc0`},
		"no list":          {gateways0, `"gw"`, `primary_gateways in federation is not a list of strings`},
		"a faulty list":    {gateways0, `["gw:https"]`, `:17:25: a primary gateway in federation is "gw:https": the port "https" is not a number`},
		"given twice":      {gateways0, `["gw", "GW:8443"]`, `the primary gateway GW:8443 is given twice in federation`},
		"SRV twice":        {gateways0, `["srv:_gw._tcp.x", "srv:_GW._tcp.x."]`, `the primary gateway srv:_GW._tcp.x. is given twice in federation`},
		"SRV and port":     {gateways0, `["srv:_gw._tcp.x:8443"]`, `a primary gateway in federation is "srv:_gw._tcp.x:8443": SRV records tell the port themselves; write "srv:" and the name of SRV records`},
		"SRV of nothing":   {gateways0, `["srv:"]`, `is "srv:": the label "" is empty`},
		"SRV of a line":    {gateways0, `["srv:_._tcp.x"]`, `the label "_" is empty`},
		"SRV in the midst": {gateways0, `["srv:g_w._tcp.x"]`, `the label "g_w" has the character '_'`},
		"SRV of a number":  {gateways0, `["srv:10.71.0.1"]`, `it has an address or a port where a name should be`},
		"SRV of a length":  {gateways0, `["srv:` + strings.Repeat("_abcdefgh.", 25) + `abcd"]`, `the name has 254 characters, at most 253 are allowed`},
	})
	long := `["srv:` + strings.Repeat("_abcdefgh.", 25) + `abc."]`
	if _, err := LoadSidecar(write(t, aloneSidecar+strings.Replace(ofSecondary, gateways0, long, 1)), options()); err != nil {
		t.Errorf("a name of 253 characters: %v", err)
	}
	// A fault in the gateways at the top is no second one here.
	text := "gateways = [\"x y\"]\n" + aloneSidecar + strings.Replace(ofOne, "dc1", "dc0", 1)
	mistake{want: "the host has the character"}.check(t, "faulty gateways", loadSidecar(t, text))
}

func loadSidecar(t *testing.T, text string) error {
	t.Helper()
	_, err := LoadSidecar(write(t, text), options())
	return err
}

func TestFederationAddressFaults(t *testing.T) {
	const add = `; add address = "10.71.0.11:8443", what this datacenter dials`
	sidecarMistakes(t, aloneSidecar+ofOne, map[string]mistake{
		"loopback server": {`address   = "10.71.0.11"`, "", `:15:1: address is missing in federation, and others can dial neither 0.0.0.0:9443, where the sidecar listens, nor 127.0.0.1, where the server does` + add},
		"a free port":     {"0.0.0.0:9443", "10.71.0.11:0", `address is missing in federation, and others cannot dial 10.71.0.11:0, where the sidecar listens` + add},
		"all and free":    {"0.0.0.0:9443", "[::]:0", `others cannot dial [::]:0, where the sidecar listens`},
		"faulty listener": {"0.0.0.0:9443", "x:y", `:8:20: address in listen is "x:y"`},
		"no listener":     {`listen { address = "0.0.0.0:9443" }`, "", `the listen block is missing`},
		"faulty server":   {`address   = "10.71.0.11"`, `address   = "0.0.0.0"`, `address in server is 0.0.0.0, which stands for every address`},
		"every address":   {primaryIs1, primaryIs1 + "\n  address = \"0.0.0.0:8443\"", `:17:13: address in federation is "0.0.0.0:8443": it stands for every address, and one is needed to dial`},
		"port 0":          {primaryIs1, primaryIs1 + "\n  address = \"10.71.0.11:0\"", `the port "0" is not a number from 1 to 65535`},
		"a zone":          {primaryIs1, primaryIs1 + "\n  address = \"[fe80::1%eth0]:1\"", `address in federation is [fe80::1%eth0]:1, whose zone means something on this host alone; give one that other hosts can dial`},
		"a group":         {primaryIs1, primaryIs1 + "\n  address = \"224.0.0.1:1\"", `address in federation is 224.0.0.1:1, which stands for a group`},
		"no text":         {primaryIs1, primaryIs1 + "\n  address = 1", `address in federation is a number, want a string`},
	})
	// A listener whose address means something on this host alone is none that
	// others can dial.
	s, err := LoadSidecar(write(t, strings.Replace(aloneSidecar, "0.0.0.0:9443", "[fe80::1%eth0]:9443", 1)+ofOne), options())
	if err != nil || s.Federation.Address != "10.71.0.11:9443" {
		t.Errorf("%+v, %v", s, err)
	}
	o := options()
	o.Overrides.Listen = "10.71.0.98:1234"
	s, err = LoadSidecar(write(t, aloneSidecar+ofOne), o)
	if err != nil || s.Federation.Address != "10.71.0.98:1234" {
		t.Errorf("with --listen: %+v, %v", s, err)
	}
}

func TestFederationFaultsOfGateways(t *testing.T) {
	const sidecars = `["10.71.0.11", "10.71.0.12:9443"]`
	gatewayMistakes(t, aloneGateway+ofPrimaryGateway, map[string]mistake{
		"no retry_join":     {"retry_join         = " + sidecars, "", `:10:1: retry_join is missing in federation, and there is no sidecar block of domain "consul"; add retry_join = ["10.71.0.11:8443"]`},
		"an empty list":     {sidecars, "[]", `retry_join is missing in federation`},
		"a faulty list":     {sidecars, `["x y"]`, `a sidecar in federation is "x y": the host has the character`},
		"primary_gateways":  {primaryIs1, primaryIs1 + "\n  primary_gateways = [\"gw\"]", `:12:3: primary_gateways in federation is for secondaries`},
		"bootstrap_expect":  {primaryIs1, primaryIs1 + "\n  bootstrap_expect = 3", `:12:3: unknown key "bootstrap_expect" in federation; it is for sidecars of the primary datacenter, which keep the store`},
		"reap":              {primaryIs1, primaryIs1 + "\n  reap = \"72h\"", `unknown key "reap" in federation; it is for sidecars`},
		"no data_dir":       {`data_dir           = "/var/lib/culvert"`, "", `data_dir is missing in federation`},
		"every address":     {`"10.71.0.1"`, `"0.0.0.0:8443"`, `:10:1: address is missing in federation, and others cannot dial 0.0.0.0:8443, where the gateway listens; add address = "10.71.0.1:8443"`},
		"a free port":       {`"10.71.0.1"`, `"10.71.0.1:0"`, `others cannot dial 10.71.0.1:0, where the gateway listens`},
		"faulty listener":   {`"10.71.0.1"`, `"x:y"`, `address in listen is "x:y"`},
		"WAN everywhere":    {`"gw.dc1.example"`, `"[::]"`, `:14:24: wan_address in federation is "[::]": it stands for every address`},
		"WAN with a zone":   {`"gw.dc1.example"`, `"[fe80::1%eth0]"`, `wan_address in federation is [fe80::1%eth0]:8443, whose zone`},
		"no certificate":    {tlsBlock, "", `federation needs a certificate of role gateway, and the tls block is missing; add a tls block: ` + "`culvert tls cert create --gateway`"},
		"retry_join abroad": {primaryIs1, primaryIs0 + "\n  primary_gateways = [\"gw\"]", `retry_join in federation is for the primary datacenter, which is dc0; take it away`},
	})
	gatewayMistakes(t, aloneGateway+ofSecondary, map[string]mistake{
		"no way":          {"primary_gateways   = " + gateways0, "", `nothing leads to the primary datacenter, dc0; add primary_gateways = ["gw.dc0.example:8443"] to it, or a block datacenter "dc0" with gateways`},
		"a way elsewhere": {"federation {\n  primary_datacenter = \"dc0\"\n  primary_gateways   = " + gateways0, "datacenter \"dc2\" { gateways = [\"x\"] }\nfederation {\n" + primaryIs0, `nothing leads to the primary datacenter, dc0`},
		"a way of none":   {"federation {\n  primary_datacenter = \"dc0\"\n  primary_gateways   = " + gateways0, "datacenter \"dc0\" {}\nfederation {\n" + primaryIs0, `datacenter "dc0" has no gateways`},
	})
	// Sidecars of another domain do not take this gateway's certificate.
	of := func(domain string) string {
		return aloneGateway + "domains = [\"consul\", \"nomad\"]\nsidecar \"a\" {\n  address = \"10.71.0.11\"\n  domain  = \"" + domain + "\"\n}\n" + ofOne
	}
	for domain, want := range map[string]string{"nomad": `there is no sidecar block of domain "consul"`, "nomat": `did you mean "nomad"?`} {
		_, err := LoadGateway(write(t, of(domain)), options())
		mistake{want: want}.check(t, domain, err)
	}
	if _, err := LoadGateway(write(t, of("consul")), options()); err != nil {
		t.Error(err)
	}
}

func TestAcceptFaults(t *testing.T) {
	const (
		v4 = `"10.72.0.0/16"`
		gw = `"203.0.113.0/24"`
		d1 = `accept "dc1" { advertise = ["10.71.0.0/16"] }`
	)
	sidecarMistakes(t, aloneSidecar+ofThree, map[string]mistake{
		"no label":         {d1, `accept { advertise = ["10.71.0.0/16"] }`, `accept has no label`},
		"in caps":          {d1, `accept "DC3" { advertise = ["10.71.0.0/16"] }`, `:25:10: datacenter "DC3" has the capital letter`},
		"twice":            {d1, `accept "dc2" { gateways = ["10.71.0.0/16"] }`, `:25:10: accept "dc2" is given twice; give each datacenter one block`},
		"of nothing":       {d1, `accept "dc1" {}`, `:25:3: accept "dc1" has neither advertise nor gateways; add advertise = ["10.72.0.0/16"] or gateways`},
		"of an empty list": {d1, `accept "dc1" { advertise = [] }`, `:25:30: advertise in accept "dc1" is empty; leave it out to accept all, or write advertise = ["10.72.0.0/16"]`},
		"of empty ways":    {gw + `, "198.51.100.7"`, "", `gateways in accept "dc2" is empty; leave it out to accept all, or write gateways = ["203.0.113.0/24"]`},
		"of no list":       {d1, `accept "dc1" { advertise = "10.71.0.0/16" }`, `advertise in accept "dc1" is not a list of strings`},
		"of numbers":       {d1, `accept "dc1" { advertise = [10] }`, `an element of advertise in accept "dc1" is not a string`},
		"host bits":        {v4, `"10.72.0.1/16"`, `:22:18: advertise in accept "dc2" has "10.72.0.1/16", which has bits set beyond the first 16; write 10.72.0.0/16`},
		"IPv6 host bits":   {`"fd72::/32"`, `"fd72::1/32"`, `which has bits set beyond the first 32; write fd72::/32`},
		"a name":           {gw, `"gw.dc2.example"`, `:23:18: gateways in accept "dc2" has "gw.dc2.example", which is no range of addresses; write it as 203.0.113.0/24, or one address`},
		"a port":           {gw, `"203.0.113.7:8443"`, `which is no range of addresses`},
		"too long":         {v4, `"10.72.0.0/33"`, `which is no range of addresses`},
		"empty":            {v4, `""`, `has "", which is no range of addresses`},
		"mapped":           {v4, `"::ffff:10.72.0.0/112"`, `which is IPv4 written as IPv6; write the IPv4 range`},
		"a zone":           {v4, `"fe80::1%eth0"`, `which has a zone; write it without`},
		"every address":    {gw, `"0.0.0.0"`, `which is no address of a host; write 0.0.0.0/0 or ::/0 for all`},
		"a range twice":    {`"198.51.100.7"`, gw, `:23:36: gateways in accept "dc2" has 203.0.113.0/24 twice`},
		"inside another's": {`["10.71.0.0/16"]`, `["10.99.0.0/16", "10.72.3.0/24"]`, `:25:47: advertise in accept "dc1" has 10.72.3.0/24, which overlaps 10.72.0.0/16 of accept "dc2"; give each datacenter ranges of its own`},
		"around another's": {`["10.71.0.0/16"]`, `["10.0.0.0/8"]`, `advertise in accept "dc1" has 10.0.0.0/8, which overlaps 10.72.0.0/16 of accept "dc2"`},
		"one of another's": {`["10.71.0.0/16"]`, `["fd72::5"]`, `advertise in accept "dc1" has fd72::5/128, which overlaps fd72::/32 of accept "dc2"`},
	})
	// Gateways may share a range, as behind one provider, and ranges of one
	// datacenter may lie in each other.
	text := strings.Replace(ofThree, d1, `accept "dc1" {
    advertise = ["10.71.0.0/16", "10.71.4.0/24"]
    gateways  = ["203.0.113.128/25"]
  }`, 1)
	if err := loadSidecar(t, aloneSidecar+text); err != nil {
		t.Error(err)
	}
	gatewayMistakes(t, aloneGateway+strings.Replace(ofPrimaryGateway, "retry_join", d1+"\n  retry_join", 1), map[string]mistake{
		"of a gateway": {`"10.71.0.0/16"`, `"10.71.0.5/16"`, `has bits set beyond the first 16; write 10.71.0.0/16`},
	})
}

// What depends on a value that is faulty is not told beside it: on the primary's
// name, and on the address by which this sidecar knows itself.
func TestFederationFaultsHaveNoFollowers(t *testing.T) {
	noExpect := strings.Replace(ofThree, "bootstrap_expect   = 3", "", 1)
	sidecarMistakes(t, aloneSidecar+noExpect, map[string]mistake{
		"no primary's name": {primaryIs1, "", `primary_datacenter is missing`},
		"no name of ours":   {`datacenter = "dc1"` + "\nnode", "node", `:1:1: datacenter is missing`},
	})
	sidecarMistakes(t, aloneSidecar+strings.Replace(ofThree, retryJoin, `["a", "b", "c", "d", "e"]`, 1), map[string]mistake{
		"no address": {`address   = "10.71.0.11"`, `address   = "0.0.0.0"`, `address in server is 0.0.0.0`},
		"none here":  {primaryIs1, primaryIs1 + "\n  address = \"x y\"", `address in federation is "x y"`},
	})
}

// What is wrong in a block too many is told as well.
func TestSecondFederationBlock(t *testing.T) {
	err := loadSidecar(t, aloneSidecar+ofOne+strings.Replace(ofOne, `""`, "5", 1))
	if err == nil || !strings.Contains(err.Error(), `:19:1: federation is given twice, first on line 15`) || !strings.Contains(err.Error(), `:21:24: data_dir in federation is a number`) {
		t.Errorf("got %v", err)
	}
}

// Faults of every part of the block come back at once.
func TestFederationFaultsAtOnce(t *testing.T) {
	for file, load := range map[string]func(string) error{
		"testdata/federation-sidecar": func(f string) error { _, err := LoadSidecar(f, options()); return err },
		"testdata/federation-gateway": func(f string) error { _, err := LoadGateway(f, options()); return err },
	} {
		want, err := os.ReadFile(file + ".golden")
		if err != nil {
			t.Fatal(err)
		}
		err = load(file + ".hcl")
		faults, ok := errors.AsType[Faults](err)
		if !ok {
			t.Fatalf("%s: no faults: %v", file, err)
		}
		if got := faults.Error() + "\n"; got != string(want) {
			t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
		}
	}
}
