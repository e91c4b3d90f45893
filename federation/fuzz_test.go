package federation

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"culvert/federation/state"
)

// entrySeeds are bodies of registrations, good and bad.
func entrySeeds(t testing.TB) []string {
	sv, gw := entryJSON(t, bob()), entryJSON(t, gateway("dc2", "bob", "gw.example:8443"))
	return []string{
		sv, gw, sv + gw, sv[:len(sv)-1], "null", "{}", "[]", "",
		`{"advertise": "fd00::1", "address": "[fd00::2]:1", "start": "x", "services": [{"name": "b", "kind": "stream", "port": 1}, {"name": "a", "kind": "packet", "port": 1}]}`,
		`{"advertise": "::ffff:10.0.0.1", "address": "A.Example:65535", "start": "x", "services": [{"name": "b", "kind": "stream", "port": 1}]}`,
		`{"address": "h:1", "wan_address": "[::1]:2", "start": "~", "replaced": "y", "health": "critical", "since": "1999-01-01T00:00:00Z", "node": "eve", "name": "eve"}`,
		strings.Replace(sv, "10.71.0.11", "\u212aelvin", 1), strings.Replace(sv, "127.77.2.1", "fe80::1%eth0", 1),
		strings.Replace(sv, `"port":7946`, `"port":7946,"PORT":1,"Kind":"stream"`, 1), strings.Replace(sv, "0.1.0", `\ud800`, 1),
	}
}

// The seeds are not all refused: the property holds for good entries without
// fuzzing too.
func TestEntrySeeds(t *testing.T) {
	good := 0
	for _, seed := range entrySeeds(t) {
		for _, kind := range []state.Kind{state.KindServer, state.KindGateway} {
			if _, err := decode(state.Key{Datacenter: "dc2", Kind: kind, Name: "bob"}, seed); err == nil {
				good++
			}
		}
	}
	if good < 7 {
		t.Errorf("%d good entries among the seeds", good)
	}
}

// decode reads an entry as the API does.
func decode(k state.Key, body string) (state.Registration, error) {
	r := httptest.NewRequest(http.MethodPut, "/", strings.NewReader(body))
	reg, err := readEntry(httptest.NewRecorder(), r, k)
	if err == nil {
		err = reg.Check()
	}
	return reg, err
}

// Whatever a body says, what comes of it is refused or is the entry of whom the path
// names, living; every store takes it alike, as often as it comes, and every
// reader has it as it was given.
func FuzzEntry(f *testing.F) {
	for _, seed := range entrySeeds(f) {
		f.Add(false, seed)
		f.Add(true, seed)
	}
	f.Fuzz(func(t *testing.T, isGateway bool, body string) {
		k := state.Key{Datacenter: "dc2", Kind: state.KindServer, Name: "bob"}
		if isGateway {
			k.Kind = state.KindGateway
		}
		reg, err := decode(k, body)
		if err != nil {
			return
		}
		if reg.Key() != k || reg.Process().Replaced != "" || reg.Process().Start == "" {
			t.Errorf("%q is an entry of %s, by %+v", body, reg.Key(), reg.Process())
		}
		if reg.Server != nil && (reg.Server.Health != state.Passing || !reg.Server.Since.IsZero()) ||
			reg.Gateway != nil && (reg.Gateway.Health != state.Passing || !reg.Gateway.Since.IsZero()) {
			t.Errorf("%q has a health of its own", body)
		}
		s, err := state.New().Apply(1, state.Command{At: time.Unix(1700000000, 0), Register: &reg})
		if err != nil || !s.Has(&reg) {
			t.Fatalf("%q: the store does not have it: %v", body, err)
		}
		if again, err := s.Apply(2, state.Command{At: time.Unix(1700000009, 0), Register: &reg}); err != nil || again != s {
			t.Errorf("%q: the same entry is a change: %v", body, err)
		}
		next, err := state.New().With("S", 1, s.All(), true)
		if err != nil || next.Hash() != s.Hash() || !next.Has(&reg) {
			t.Errorf("%q: a reader does not have it: %v", body, err)
		}
		b, err := json.Marshal(&reg)
		var back state.Registration
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || !s.Has(&back) {
			t.Errorf("%q: not the same through the log: %v", body, err)
		}
	})
}

// Whatever a question says, its time is bounded, and nothing is waited for that is
// not named; what is good can be asked again in other words.
func FuzzQuery(f *testing.F) {
	seeds := []string{
		"", "index=5", "index=5&wait=60s", "index=0&wait=60s", "wait=24h", "index=5&wait=-1s", "index=-5", "changes", "changes=false&store=S&index=7", "changes&stream&wait=5s", "stream",
		"store=", "index=18446744073709551615", "index=18446744073709551616", "index=1&wait=0", "index=%31", "index=1;wait=2s", "%zz", "index=1&index=x",
		"index=1&wait=2562047h47m16.854775807s", "wait=1e9s", "index=+5", "index=0x5",
	}
	for _, seed := range seeds {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := parseQuery(&http.Request{URL: &url.URL{RawQuery: raw}})
		if err != nil {
			if len(err.Error()) == 0 {
				t.Errorf("%q is refused without a word", raw)
			}
			return
		}
		if q.wait < 0 || q.wait > MaxWait || q.index == 0 && q.wait != 0 && !q.stream || q.store != "" && !q.named {
			t.Errorf("%q is %+v", raw, q)
		}
		words := url.Values{"index": {strconv.FormatUint(q.index, 10)}, "wait": {q.wait.String()}}
		if q.named {
			words.Set("store", q.store)
		}
		if q.changes {
			words.Set("changes", "")
		}
		if q.stream {
			words.Set("stream", "")
		}
		again, err := parseQuery(&http.Request{URL: &url.URL{RawQuery: words.Encode()}})
		if err != nil || again != q {
			t.Errorf("%q is %+v, and in other words %+v, %v", raw, q, again, err)
		}
	})
}
