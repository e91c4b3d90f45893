// Package test proves the promises of culvert end to end: the real binary,
// real serf agents, in network namespaces. One promise a file.
package test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"culvert/config"
	"culvert/test/lab"
)

// TestMain counts the end-to-end tests: how many ran, how many did not, and how
// many there are. The last line goes to the file that CULVERT_E2E_SUMMARY
// names, which `make test` prints at its end.
func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "culvert-configs-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	lab.Configs = dir
	code := m.Run()
	if given("list") {
		return code // nothing was to run
	}
	ran, skipped := lab.Counts()
	inSource, err := countTests()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	summary := fmt.Sprintf("end-to-end: %d run, %d skipped, of %d in the source\n", ran, skipped, inSource)
	if lack := lab.Missing(); lack != "" {
		summary = "end-to-end tests are skipped: " + lack + "\n" + summary
	}
	fmt.Print(summary)
	if file := os.Getenv("CULVERT_E2E_SUMMARY"); file != "" {
		if err := os.WriteFile(file, []byte(summary), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	chosen := given("run") || given("skip")
	if code == 0 && !chosen && skipped == 0 {
		if unused, err := unusedAttributes(dir); err != nil || len(unused) > 0 {
			fmt.Fprintf(os.Stderr, "attributes of the configuration that no end-to-end test uses: %v (%v)\n", unused, err)
			return 1
		}
	}
	if code == 0 && os.Getenv("CULVERT_E2E") == "require" && !chosen && (skipped > 0 || int(ran) != inSource*rounds()) {
		fmt.Fprintln(os.Stderr, "CULVERT_E2E=require: every end-to-end test must run")
		return 1
	}
	return code
}

// given tells whether a flag of go test was set.
func given(name string) bool { return flag.Lookup("test."+name).Value.String() != "" }

// rounds is how often each test runs: the value of -count.
func rounds() int {
	n, err := strconv.Atoi(flag.Lookup("test.count").Value.String())
	if err != nil {
		return 1
	}
	return n
}

// unusedAttributes lists the attributes of the schema that no configuration of
// this run has set.
func unusedAttributes(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.hcl"))
	if err != nil {
		return nil, err
	}
	used := make(map[string]bool)
	for _, file := range files {
		attributes, err := config.Used(file)
		if err != nil {
			return nil, err
		}
		for _, a := range attributes {
			used[a] = true
		}
	}
	return slices.DeleteFunc(config.Attributes(), func(a string) bool { return used[a] }), nil
}

// countTests counts the tests in the source that call lab.Require.
func countTests() (int, error) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			return 0, err
		}
		for _, d := range parsed.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && requires(f) {
				n++
			}
		}
	}
	return n, nil
}

func requires(f *ast.FuncDecl) bool {
	found := false
	ast.Inspect(f, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if ok && sel.Sel.Name == "Require" {
			pkg, ok := sel.X.(*ast.Ident)
			found = found || ok && pkg.Name == "lab"
		}
		return !found
	})
	return found
}
