package alpn

import (
	"slices"
	"strings"
	"testing"
)

func services() []Service {
	return []Service{
		{Name: "gossip-packet", Kind: KindPacket, ALPN: "consul/wan-gossip/packet"},
		{Name: "gossip-stream", Kind: KindStream, ALPN: "consul/wan-gossip/stream"},
		{Name: "rpc", Kind: KindStream},
	}
}

func mustTable(t testing.TB, s []Service) *Table {
	t.Helper()
	table, err := NewTable(s)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestTable(t *testing.T) {
	table := mustTable(t, services())
	want := []string{
		"culvert/packet/1/gossip-packet", "culvert/stream/1/gossip-stream", "culvert/stream/1/rpc",
		"consul/wan-gossip/packet", "consul/wan-gossip/stream",
	}
	if got := table.Protocols(); !slices.Equal(got, want) {
		t.Errorf("Protocols() = %q, want %q", got, want)
	}
	for _, p := range want {
		r, ok := table.Lookup(p)
		if !ok || r.Protocol != p {
			t.Errorf("Lookup(%q) = %+v, %v", p, r, ok)
		}
		if native := strings.HasPrefix(p, "consul/"); r.Native != native {
			t.Errorf("Lookup(%q).Native = %v", p, r.Native)
		}
	}
	if r, _ := table.Lookup("consul/wan-gossip/packet"); r.Service != "gossip-packet" || r.Kind != KindPacket {
		t.Errorf("native packet route is %+v", r)
	}
	for _, p := range []string{"", "h2", "culvert/stream/1/gossip-packet", "culvert/packet/1/", "CULVERT/packet/1/gossip-packet"} {
		if r, ok := table.Lookup(p); ok {
			t.Errorf("Lookup(%q) = %+v, want no route", p, r)
		}
	}
	if got, want := table.Offer("gossip-packet"), []string{"culvert/packet/1/gossip-packet", "consul/wan-gossip/packet"}; !slices.Equal(got, want) {
		t.Errorf("Offer = %q, want %q", got, want)
	}
	if got := table.Offer("nothing"); got != nil {
		t.Errorf("Offer of an unknown service = %q", got)
	}
	table.Protocols()[0] = "x"
	table.Offer("rpc")[0] = "x"
	if table.Protocols()[0] == "x" || table.Offer("rpc")[0] == "x" {
		t.Error("a caller can change the table")
	}
}

func TestTableErrors(t *testing.T) {
	ok := Service{Name: "a", Kind: KindStream, ALPN: "x/y"}
	for want, s := range map[string][]Service{
		"no service":                  {},
		"want 1 to 63":                {{Name: "A", Kind: KindStream}},
		`service name ""`:             {{Kind: KindStream}},
		"neither packet nor stream":   {{Name: "a"}},
		"given twice":                 {ok, {Name: "a", Kind: KindPacket}},
		`taken by service "a"`:        {ok, {Name: "b", Kind: KindStream, ALPN: "x/y"}},
		"culvert/ names are Culvert'": {{Name: "a", Kind: KindStream, ALPN: "culvert/stream/1/b"}},
		"HTTP is no service":          {{Name: "a", Kind: KindStream, ALPN: "h2"}},
		"at most 255":                 {{Name: "a", Kind: KindStream, ALPN: strings.Repeat("x", 256)}},
	} {
		if _, err := NewTable(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("NewTable(%+v) error %v, want %q", s, err, want)
		}
	}
}
