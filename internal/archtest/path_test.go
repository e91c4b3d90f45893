package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A hop is one function of a path that docs/architecture.md tells to read.
type hop struct{ file, name string }

var hopLine = regexp.MustCompile("^([0-9]+)\\. `([^`]+\\.go)` `([^`]+)`")

// readPaths returns the numbered lists of hops.
func readPaths(t *testing.T) [][]hop {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	var paths [][]hop
	for line := range strings.Lines(string(page)) {
		m := hopLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			paths = append(paths, nil)
		}
		last := len(paths) - 1
		if last < 0 || n != len(paths[last])+1 {
			t.Fatalf("hop %q is out of order", line)
		}
		paths[last] = append(paths[last], hop{m[2], m[3]})
	}
	return paths
}

// function finds a function, named Type.Method for a method.
func function(t *testing.T, h hop) *ast.FuncDecl {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, h.file), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range parsed.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && qualified(f) == h.name {
			return f
		}
	}
	t.Fatalf("%s has no function %s", h.file, h.name)
	return nil
}

func qualified(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return f.Name.Name
	}
	recv := f.Recv.List[0].Type
	if star, ok := recv.(*ast.StarExpr); ok {
		recv = star.X
	}
	if id, ok := recv.(*ast.Ident); ok {
		return id.Name + "." + f.Name.Name
	}
	return f.Name.Name
}

// Each hop of a path calls the next one, or constructs the type whose method
// the next one is.
func TestReadersPath(t *testing.T) {
	paths := readPaths(t)
	if len(paths) < 3 {
		t.Fatalf("docs/architecture.md has %d paths", len(paths))
	}
	first := paths[0]
	if len(first) > 8 {
		t.Errorf("the reader's path has %d hops, at most 8", len(first))
	}
	if first[0] != (hop{"cmd/culvert/sidecar.go", "runSidecar"}) {
		t.Errorf("the reader's path begins at %v", first[0])
	}
	for _, path := range paths {
		for i, h := range path {
			f := function(t, h)
			if i+1 == len(path) {
				continue
			}
			typ, method, isMethod := strings.Cut(path[i+1].name, ".")
			if !isMethod {
				method = typ
			}
			if !calls(f, method) && (!isMethod || !calls(f, typ)) {
				t.Errorf("%s in %s neither calls nor constructs %s", h.name, h.file, path[i+1].name)
			}
		}
	}
	last := function(t, first[len(first)-1])
	if !calls(last, "send") {
		t.Errorf("the reader's path ends in %s, which writes no packet", first[len(first)-1].name)
	}
}
