package config

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	hclBlock  = regexp.MustCompile("(?ms)^```hcl\n(.*?)\n```$")
	named     = regexp.MustCompile("(?ms)^```[a-z]* (deploy/\\S+)\n(.*?)\n```$")
	declared  = regexp.MustCompile(`(?m)^func (Test[A-Z]\w*|Benchmark[A-Z]\w*)\(`)
	mentioned = regexp.MustCompile(`\b(?:Test|Benchmark)[A-Z]\w*`)
	topLevel  = regexp.MustCompile(`(?m)^([a-z_]+)\b`)
)

// What README.md and the handbook show as a configuration is one: complete, or
// with what it leaves out added, it has no fault.
func TestPagesHaveNoFaults(t *testing.T) {
	for page, atLeast := range map[string]int{"../README.md": 5, "../docs/federation.md": 10} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		found := hclBlock.FindAllStringSubmatch(string(text), -1)
		if len(found) < atLeast {
			t.Errorf("%s has %d configurations, want %d", page, len(found), atLeast)
		}
		for _, m := range found {
			file := write(t, completed(m[1]))
			kind, err := KindOf(file)
			if err == nil && kind == KindSidecar {
				_, err = LoadSidecar(file, options())
			} else if err == nil {
				_, err = LoadGateway(file, options())
			}
			if err != nil {
				t.Errorf("%s shows\n%s\nwhich has faults:\n%v", page, m[1], err)
			}
		}
	}
}

// completed adds what makes a sidecar's configuration of a part of one. One that
// leads to the primary is of a secondary.
func completed(text string) string {
	has := make(map[string]bool)
	for _, m := range topLevel.FindAllStringSubmatch(text, -1) {
		has[m[1]] = true
	}
	if has["datacenter"] {
		return text
	}
	datacenter := "dc1"
	if strings.Contains(text, "primary_gateways") || has["federation"] && has["gateways"] {
		datacenter = "dc2"
	}
	out := "datacenter = \"" + datacenter + "\"\nnode = \"amos\"\nlisten { address = \"10.71.0.14:8443\" }\n" + tlsBlock
	if !has["server"] {
		out += "server {\n  profile = \"serf\"\n  address = \"10.71.0.14\"\n  advertise = \"127.77.1.4\"\n}\n"
	}
	if has["peer"] && !has["gateways"] {
		out += "gateways = [\"10.71.0.1:8443\"]\n"
	}
	return out + text
}

// What a page shows of deploy/ is what is there, which end-to-end tests run.
func TestPagesShowWhatIsDeployed(t *testing.T) {
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := make(map[string]bool)
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			shown[m[1]] = true
			file, err := os.ReadFile("../" + m[1])
			if err != nil || strings.TrimRight(string(file), "\n") != m[2] {
				t.Errorf("%s shows another %s than there is (%v)", page, m[1], err)
			}
		}
	}
	files, err := filepath.Glob("../deploy/*/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("deploy has %d files, %v", len(files), err)
	}
	for _, file := range files {
		if name := strings.TrimPrefix(file, "../"); !shown[name] {
			t.Errorf("no page shows %s", name)
		}
	}
}

// A test that a page names is there.
func TestPagesNameTests(t *testing.T) {
	have := make(map[string]bool)
	err := filepath.WalkDir("..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			have[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range mentioned.FindAllString(string(text), -1) {
			if !have[name] && (!strings.HasPrefix(name, "Benchmark") || !prefixed(have, name)) {
				t.Errorf("%s names %s, which does not exist", page, name)
			}
		}
	}
}

// prefixed tells whether a name is one of what `go test -bench` takes for several.
func prefixed(have map[string]bool, name string) bool {
	for h := range have {
		if strings.HasPrefix(h, name) {
			return true
		}
	}
	return false
}
