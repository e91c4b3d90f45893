package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"culvert/sidecar"
)

// blocks returns the contents of a page's fenced blocks that begin so.
func blocks(t *testing.T, file, fence string) []string {
	t.Helper()
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range regexp.MustCompile("(?ms)^```"+fence+"\n(.*?)\n```$").FindAllStringSubmatch(string(page), -1) {
		out = append(out, m[1])
	}
	return out
}

// What docs/federation.md shows on a terminal is what the commands print for the
// answers that docs/api.md has.
func TestHandbookTerminals(t *testing.T) {
	explanation := blocks(t, "../../docs/api.md", "json explanation")
	if len(explanation) != 1 {
		t.Fatalf("docs/api.md has %d explanations", len(explanation))
	}
	answers := map[string]string{"/v1/explain/dc2/bob": explanation[0]}
	for _, answer := range blocks(t, "../../docs/api.md", "http answer") {
		_, body, _ := strings.Cut(answer, "\n\n")
		switch {
		case strings.HasPrefix(body, `[{"datacenter": "dc1"`):
			answers["/v1/federation-states"] = body // the last one
		case strings.HasPrefix(body, `{"datacenter": "dc1"`):
			answers["/v1/federation-state/dc1"] = body
		}
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, answers[r.URL.Path])
	}))
	defer s.Close()
	terminals := blocks(t, "../../docs/federation.md", "console")
	if len(terminals) != 3 {
		t.Fatalf("docs/federation.md shows %d terminals", len(terminals))
	}
	for _, shown := range terminals {
		command, want, _ := strings.Cut(shown, "\n")
		args := append(strings.Fields(command)[2:], "--admin", s.Listener.Addr().String())
		code, stdout, stderr := culvert(t, args...)
		if got := trimmed(stdout); code != exitOK || got != trimmed(want) {
			t.Errorf("%s ends with %d and prints %s\n%s", command, code, stderr, got)
		}
	}
}

// trimmed is without what nobody sees.
func trimmed(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	return strings.Join(lines, "\n")
}

// The explanation of docs/api.md has the keys of a real one, and no others.
func TestExplanationPage(t *testing.T) {
	page := blocks(t, "../../docs/api.md", "json explanation")[0]
	var e sidecar.Explanation
	d := json.NewDecoder(strings.NewReader(page))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if err := json.NewDecoder(bytes.NewReader(again)).Decode(&a); err != nil {
		t.Fatal(err)
	}
	if err := json.NewDecoder(strings.NewReader(page)).Decode(&b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("docs/api.md has\n%s\nand it would be\n%s", page, again)
	}
}
