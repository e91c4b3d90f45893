package config

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// FuzzLoad: whatever the file holds, reading it does not panic and ends in a
// configuration or in faults, never both; faults are one a line; and what is
// accepted, written out with every default, is read back as the same.
func FuzzLoad(f *testing.F) {
	for _, seed := range seeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		file := write(t, text)
		s, err := LoadSidecar(file, options())
		checkOutcome(t, s == nil, err)
		if err == nil {
			again, err := LoadSidecar(write(t, writeSidecar(s)), options())
			if err != nil || !reflect.DeepEqual(s, again) {
				t.Fatalf("read\n%+v\nwrote\n%s\nand read\n%+v, %v", s, writeSidecar(s), again, err)
			}
		}
		g, err := LoadGateway(file, options())
		checkOutcome(t, g == nil, err)
		if err == nil {
			again, err := LoadGateway(write(t, writeGateway(g)), options())
			if err != nil || !reflect.DeepEqual(g, again) {
				t.Fatalf("read\n%+v\nwrote\n%s\nand read\n%+v, %v", g, writeGateway(g), again, err)
			}
		}
	})
}

func seeds() []string {
	return []string{
		goodSidecar, goodGateway, goodGateway + tlsBlock,
		`server "x" { server = [ env(hostname()), -1, null ] }`,
		goodSidecar + "server {}\npeer {}\npeer \"a\" \"b\" {}\nfederation {}\n",
		strings.Replace(goodSidecar, `"serf"`, `"nomad"`, 1) + "domain = \"x\"\non_exit = \"open\"\n" +
			"service \"rpc\" {\n  alpn = \"x/rpc\"\n  local = \"127.0.0.1:1\"\n}\nlog {\n  level = \"warn\"\n  format = \"json\"\n}\n",
		strings.NewReplacer("127.77.1.1", "fd77::1", "127.77.1.2", "fd77::2", "127.77.2.1", "fd77::3", `"10.71.0.12"`, `"[fd00::12]"`).Replace(goodSidecar),
		goodSidecar + "service \"p\" {\n  kind = \"stream\"\n  port = 1e3000000\n}\n",
		aloneSidecar + ofOne, aloneSidecar + ofThree, aloneSidecar + ofSecondary, goodSidecar + ofOne,
		aloneGateway + ofPrimaryGateway, aloneGateway + ofSecondary, goodGateway + tlsBlock + ofOne,
		aloneSidecar + ofThree + ofSecondary + "federation { accept {} }\n",
	}
}

// The seeds are not all refused: the round trip is tested without fuzzing too.
func TestSeedsReachTheRoundTrip(t *testing.T) {
	sidecars, gateways := 0, 0
	for _, seed := range seeds() {
		if _, err := LoadSidecar(write(t, seed), options()); err == nil {
			sidecars++
		}
		if _, err := LoadGateway(write(t, seed), options()); err == nil {
			gateways++
		}
	}
	if sidecars != 7 || gateways != 4 {
		t.Errorf("%d sidecars and %d gateways among the seeds, want 7 and 4", sidecars, gateways)
	}
}

func checkOutcome(t *testing.T, none bool, err error) {
	t.Helper()
	if none != (err != nil) {
		t.Fatalf("a result and an error, or neither: %v", err)
	}
	faults, ok := errors.AsType[Faults](err)
	if err != nil && (!ok || len(faults) == 0) {
		t.Fatalf("an error that is no faults: %v", err)
	}
	if ok && strings.Count(faults.Error(), "\n")+1 != len(faults) {
		t.Fatalf("%d faults are not one a line: %q", len(faults), faults.Error())
	}
	for _, fault := range faults {
		if fault.Summary == "" || fault.Line < 1 || fault.Column < 1 {
			t.Fatalf("a fault without words or place: %+v", fault)
		}
	}
}

// A writer writes a configuration with nothing left out.
type writer struct{ strings.Builder }

func (w *writer) text(key, s string) { fmt.Fprintf(w, "%s = %s\n", key, quote(s)) }

func (w *writer) optional(key, s string) {
	if s != "" {
		w.text(key, s)
	}
}

func (w *writer) list(key string, items []string) {
	quoted := make([]string, len(items))
	for i, s := range items {
		quoted[i] = quote(s)
	}
	fmt.Fprintf(w, "%s = [%s]\n", key, strings.Join(quoted, ", "))
}

func (w *writer) block(kind, label string, body func()) {
	w.WriteString(kind)
	if label != "" {
		w.WriteString(" " + quote(label))
	}
	w.WriteString(" {\n")
	body()
	w.WriteString("}\n")
}

// quote writes every character by its number, so that none means anything.
func quote(s string) string {
	var b strings.Builder
	for _, r := range s {
		fmt.Fprintf(&b, `\U%08x`, r)
	}
	return `"` + b.String() + `"`
}

func writeSidecar(s *Sidecar) string {
	w := &writer{}
	w.names(s.Datacenter, s.Node, s.Domain)
	w.text("capture", s.Capture)
	w.text("on_exit", s.OnExit)
	w.block("server", "", func() {
		w.optional("profile", s.Server.Profile)
		w.text("address", s.Server.Address.String())
		w.text("advertise", s.Server.Advertise.String())
		fmt.Fprintf(w, "hairpin = %t\ntls = %t\n", s.Server.Hairpin, s.Server.TLS)
	})
	for _, v := range s.Services {
		w.block("service", v.Name, func() {
			w.text("kind", v.Kind)
			fmt.Fprintf(w, "port = %d\n", v.Port)
			w.text("local", v.Local.String())
			w.optional("alpn", v.ALPN)
		})
	}
	if s.Gateways != nil {
		w.list("gateways", s.Gateways)
	}
	for _, p := range s.Peers {
		w.block("peer", p.Node, func() {
			w.text("datacenter", p.Datacenter)
			w.text("advertise", p.Advertise.String())
			w.optional("address", p.Address)
		})
	}
	w.datacenters(s.Datacenters)
	w.federation(s.Federation, s.Federation != nil && s.Federation.PrimaryDatacenter == s.Datacenter)
	w.rest(s.Listen, s.TLS, s.Admin, s.Log)
	return w.String()
}

func writeGateway(g *Gateway) string {
	w := &writer{}
	w.names(g.Datacenter, g.Node, g.Domain)
	w.list("domains", g.Domains)
	for _, s := range g.Sidecars {
		w.block("sidecar", s.Node, func() {
			w.text("address", s.Address)
			w.text("domain", s.Domain)
		})
	}
	w.datacenters(g.Datacenters)
	w.federation(g.Federation, false)
	w.rest(g.Listen, g.TLS, g.Admin, g.Log)
	return w.String()
}

func (w *writer) names(datacenter, node, domain string) {
	w.text("datacenter", datacenter)
	w.text("node", node)
	w.text("domain", domain)
}

func (w *writer) datacenters(all []Datacenter) {
	for _, d := range all {
		w.block("datacenter", d.Name, func() {
			if d.Gateways != nil {
				w.list("gateways", d.Gateways)
			}
			w.optional("mode", d.Mode)
		})
	}
}

// federation writes a block; store tells that the store's settings are in it.
func (w *writer) federation(f *Federation, store bool) {
	if f == nil {
		return
	}
	w.block("federation", "", func() {
		w.text("primary_datacenter", f.PrimaryDatacenter)
		w.text("data_dir", f.DataDir)
		w.text("address", f.Address)
		w.optional("wan_address", f.WANAddress)
		w.some("primary_gateways", f.PrimaryGateways)
		w.some("retry_join", f.RetryJoin)
		if store {
			fmt.Fprintf(w, "bootstrap_expect = %d\n", f.BootstrapExpect)
			w.text("reap", f.Reap.String())
		}
		for _, a := range f.Accept {
			w.block("accept", a.Datacenter, func() {
				w.some("advertise", texts(a.Advertise))
				w.some("gateways", texts(a.Gateways))
			})
		}
	})
}

func texts(prefixes []netip.Prefix) []string {
	var out []string
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}

// some writes a list that is not empty.
func (w *writer) some(key string, items []string) {
	if len(items) > 0 {
		w.list(key, items)
	}
}

func (w *writer) rest(l Listen, t TLS, a Admin, g Log) {
	w.block("listen", "", func() {
		w.text("address", l.Address)
		w.optional("passthrough", l.Passthrough)
		if l.PassthroughTLS {
			fmt.Fprintln(w, "passthrough_tls = true")
		}
	})
	if t != (TLS{}) {
		w.block("tls", "", func() {
			w.text("ca_file", t.CAFile)
			w.text("cert_file", t.CertFile)
			w.text("key_file", t.KeyFile)
		})
	}
	w.block("admin", "", func() { w.text("address", a.Address) })
	w.block("log", "", func() {
		w.text("level", g.Level)
		w.optional("format", g.Format)
	})
}
