package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "culvert"

// The tiers of the design: a package may import packages of lower tiers, and
// the ones of its own tier that its line names. internal/ is below all.
var imports = map[string][]string{
	"sniff":   {},
	"certs":   {},
	"config":  {},
	"catalog": {},

	"capture/ruleset": {},
	"stream/session":  {},

	"mux":     {"sniff", "certs", "catalog"},
	"alpn":    {"sniff", "certs", "catalog"},
	"packet":  {"sniff", "certs", "catalog"},
	"stream":  {"sniff", "certs", "catalog", "stream/session"},
	"capture": {"sniff", "certs", "catalog", "capture/ruleset"},
	"locator": {"sniff", "certs", "catalog"},
	"admin":   {"sniff", "certs", "catalog"},

	"federation/state": {},
	"federation/store": {"federation/state"},
	"federation":       {"federation/state", "federation/store", "certs"},

	"gateway": {"config", "mux", "alpn", "locator", "admin", "federation", "federation/state", "sniff", "certs", "catalog"},
	"sidecar": {
		"config", "mux", "alpn", "packet", "stream", "capture", "locator", "admin", "federation", "federation/state", "federation/store",
		"sniff", "certs", "catalog",
	},

	"cmd/culvert": {
		"config", "sidecar", "gateway", "admin", "certs", "capture/ruleset", "locator", "federation", "federation/state",
	},
}

// pure packages import nothing of the module at all, not even internal/.
var pure = []string{"sniff", "certs", "config"}

// fenced are imports from outside that stay in a few packages, or stay out of
// a few.
var fenced = []struct {
	prefix string
	only   []string // nil: everywhere
	never  []string
}{
	{"github.com/hashicorp/hcl/", []string{"config"}, nil},
	{"github.com/zclconf/go-cty", []string{"config"}, nil},
	{"github.com/spf13/cobra", []string{"cmd/culvert"}, nil},
	{"github.com/miekg/dns", []string{"internal/resolve"}, nil},
	{"github.com/hashicorp/raft", []string{"federation/store"}, nil},
	{"github.com/hashicorp/yamux", []string{"stream/session"}, nil},
	{"github.com/google/nftables", []string{"capture/ruleset"}, nil},
	{"github.com/mdlayher/netlink", []string{"capture/ruleset", "internal/iproute"}, nil},
	{"go.etcd.io/bbolt", []string{"federation/store"}, nil},
	{"github.com/hashicorp/go-hclog", []string{"federation/store"}, nil},
	{"go.uber.org/zap", nil, []string{"sniff", "config"}},
	{"github.com/prometheus/", nil, []string{"sniff", "config"}},
}

const root = "../.."

// goFiles calls f with each Go file of the product, its folder relative to the
// module's root.
func goFiles(t *testing.T, tests bool, f func(dir, file string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if strings.HasPrefix(d.Name(), ".") && rel != "." || rel == "test" || rel == "tools" || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(p, ".go") && strings.HasSuffix(p, "_test.go") == tests {
			f(path.Dir(filepath.ToSlash(rel)), p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func importsOf(t *testing.T, file string) []string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, i := range parsed.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func TestImportTable(t *testing.T) {
	seen := make(map[string]bool)
	goFiles(t, false, func(dir, file string) {
		seen[dir] = true
		for _, imp := range importsOf(t, file) {
			if rel, ours := strings.CutPrefix(imp, module+"/"); ours {
				checkOwn(t, dir, file, rel)
			} else {
				checkFence(t, dir, file, imp)
			}
		}
	})
	for dir := range imports {
		if !seen[dir] {
			t.Errorf("%s is in the import table and not in the tree", dir)
		}
	}
	for dir := range seen {
		if _, listed := imports[dir]; !listed && !strings.HasPrefix(dir, "internal/") {
			t.Errorf("%s is not in the import table", dir)
		}
	}
}

func checkOwn(t *testing.T, dir, file, imp string) {
	t.Helper()
	switch {
	case slices.Contains(pure, dir):
		t.Errorf("%s imports %s: %s imports nothing of the module", file, imp, dir)
	case strings.HasPrefix(imp, "internal/test"), imp == "internal/memnet":
		t.Errorf("%s imports %s, which is for tests", file, imp)
	case strings.HasPrefix(imp, "internal/"):
	case strings.HasPrefix(dir, "internal/"):
		if dir != "internal/testpki" {
			t.Errorf("%s imports %s: internal/ is below every other package", file, imp)
		}
	case !slices.Contains(imports[dir], imp):
		t.Errorf("%s imports %s: the import table does not allow %s that", file, imp, dir)
	}
}

func checkFence(t *testing.T, dir, file, imp string) {
	t.Helper()
	for _, f := range fenced {
		if !strings.HasPrefix(imp, f.prefix) {
			continue
		}
		if f.only != nil && !slices.Contains(f.only, dir) {
			t.Errorf("%s imports %s, which stays in %v", file, imp, f.only)
		}
		if slices.Contains(f.never, dir) {
			t.Errorf("%s imports %s, which %s must not", file, imp, dir)
		}
	}
}

// The codec is what other implementations would copy: it stands alone.
func TestPacketCodecImportsNothingOfTheModule(t *testing.T) {
	found := false
	goFiles(t, false, func(dir, file string) {
		if dir != "packet" || filepath.Base(file) != "codec.go" {
			return
		}
		found = true
		for _, imp := range importsOf(t, file) {
			if strings.HasPrefix(imp, module+"/") {
				t.Errorf("%s imports %s", file, imp)
			}
		}
	})
	if !found {
		t.Error("packet/codec.go is not there")
	}
}
