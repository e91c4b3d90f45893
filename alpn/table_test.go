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

func mustTable(t testing.TB, s []Service, federation ...string) *Table {
	t.Helper()
	table, err := NewTable(s, federation...)
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

// Of the federation's protocols a table has those that it is told to have, in an
// order that does not depend on how.
func TestFederationProtocols(t *testing.T) {
	all := []string{
		"culvert/packet/1/gossip-packet", "culvert/stream/1/gossip-stream", "culvert/stream/1/rpc",
		"culvert/raft/1", "consul/wan-gossip/packet", "consul/wan-gossip/stream", "h2",
	}
	for _, federation := range [][]string{{Raft, HTTP}, {HTTP, Raft}, {HTTP, Raft, HTTP}} {
		if got := mustTable(t, services(), federation...).Protocols(); !slices.Equal(got, all) {
			t.Errorf("Protocols() = %q, want %q", got, all)
		}
	}
	table := mustTable(t, services(), Raft, HTTP)
	for p, kind := range map[string]Kind{Raft: KindRaft, HTTP: KindHTTP} {
		if r, ok := table.Lookup(p); !ok || r != (Route{Protocol: p, Kind: kind}) {
			t.Errorf("Lookup(%q) = %+v, %v", p, r, ok)
		}
		if got := table.offerProtocol(p); !slices.Equal(got, []string{p}) {
			t.Errorf("offered for %q: %q", p, got)
		}
		if got := table.Offer(p); got != nil {
			t.Errorf("Offer(%q) = %q: it is no service", p, got)
		}
	}
	if got := mustTable(t, nil, HTTP).Protocols(); !slices.Equal(got, []string{HTTP}) {
		t.Errorf("without a service: %q", got)
	}
	if _, ok := mustTable(t, services(), HTTP).Lookup(Raft); ok {
		t.Error("a table that was not told to has raft")
	}
	// A service may be called h2, and is not what HTTP is.
	table = mustTable(t, []Service{{Name: "h2", Kind: KindStream}})
	if got := table.offerProtocol(HTTP); got != nil {
		t.Errorf("offered for h2: %q", got)
	}
	if got := table.offerProtocol("culvert/stream/1/h2"); got != nil {
		t.Errorf("a service's protocol is offered by itself: %q", got)
	}
	if _, err := NewTable(services(), "http/1.1"); err == nil || !strings.Contains(err.Error(), `"http/1.1"`) {
		t.Errorf("NewTable with http/1.1: %v", err)
	}
}

func TestKinds(t *testing.T) {
	for kind, want := range map[Kind]struct {
		name    string
		lasting bool
	}{
		KindPacket: {"packet", true},
		KindStream: {"stream", false},
		KindRaft:   {"raft", true},
		KindHTTP:   {"http", true},
	} {
		if kind.String() != want.name || kind.lasting() != want.lasting {
			t.Errorf("%v, lasting %t; want %+v", kind, kind.lasting(), want)
		}
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
		"culvert/ names are Culvert'": {{Name: "a", Kind: KindStream, ALPN: Raft}},
		"HTTP is no service":          {{Name: "a", Kind: KindStream, ALPN: "h2"}},
		`"http/1.1": HTTP is no`:      {{Name: "a", Kind: KindStream, ALPN: "http/1.1"}},
		"raft is neither packet":      {{Name: "a", Kind: KindRaft}},
		"types are for streams":       {{Name: "a", Kind: KindPacket, Types: ConsulTypes()}},
		"without an alpn name":        {{Name: "a", Kind: KindStream, ALPN: "x/y", Types: ConsulTypes()}},
		"type byte 4: given twice":    {{Name: "a", Kind: KindStream, Types: []Type{{Byte: 4, ALPN: "x/y"}, {Byte: 4, ALPN: "x/z"}}}},
		"type byte 5: alpn name":      {ok, {Name: "b", Kind: KindStream, Types: []Type{{Byte: 5, ALPN: "x/y"}}}},
		"alpn name: empty":            {{Name: "a", Kind: KindStream, Types: []Type{{Byte: 5}}}},
		"at most 255":                 {{Name: "a", Kind: KindStream, ALPN: strings.Repeat("x", 256)}},
	} {
		if _, err := NewTable(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("NewTable(%+v) error %v, want %q", s, err, want)
		}
	}
}
