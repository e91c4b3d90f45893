package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"slices"
	"testing"
)

// A package that starts goroutines has a TestMain that looks for leaked ones.
func TestGoroutinesAreWatched(t *testing.T) {
	starts := make(map[string]string) // folder -> a place that starts a goroutine
	goFiles(t, false, func(dir, file string) {
		set := token.NewFileSet()
		parsed, err := parser.ParseFile(set, file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			if startsGoroutine(n) {
				starts[dir] = set.Position(n.Pos()).String()
			}
			return true
		})
	})
	if len(starts) < 5 {
		t.Fatalf("only %v start goroutines: this test looks in the wrong place", slices.Sorted(maps.Keys(starts)))
	}
	watched := make(map[string]bool)
	goFiles(t, true, func(dir, file string) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Name.Name == "TestMain" && calls(f, "VerifyTestMain") {
				watched[dir] = true
			}
		}
	})
	for dir, place := range starts {
		if !watched[dir] {
			t.Errorf("%s starts a goroutine and no TestMain in %s calls goleak.VerifyTestMain", place, dir)
		}
	}
}

// startsGoroutine sees a go statement, the Go method of a group, and
// context.AfterFunc or time.AfterFunc, which run in goroutines of their own.
func startsGoroutine(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GoStmt:
		return true
	case *ast.CallExpr:
		sel, ok := n.Fun.(*ast.SelectorExpr)
		return ok && (sel.Sel.Name == "Go" || sel.Sel.Name == "AfterFunc")
	}
	return false
}

// calls tells whether a function's body calls, or builds a value of, something
// of that name.
func calls(f *ast.FuncDecl, name string) bool {
	found := false
	ast.Inspect(f, func(n ast.Node) bool {
		var called ast.Expr
		switch n := n.(type) {
		case *ast.CallExpr:
			called = n.Fun
		case *ast.CompositeLit:
			called = n.Type
		}
		switch c := called.(type) {
		case *ast.Ident:
			found = found || c.Name == name
		case *ast.SelectorExpr:
			found = found || c.Sel.Name == name
		}
		return !found
	})
	return found
}

// A test that lets time pass does so on the clock of a synctest bubble, its own or
// that of a helper of its package: tests on the wall clock wait for a condition.
func TestSleepIsForBubbles(t *testing.T) {
	parsed := make(map[string]*ast.File)
	helpers := make(map[string][]string) // folder -> functions that open a bubble
	goFiles(t, true, func(dir, file string) {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed[file] = f
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && imported(f, "testing/synctest") && calls(fn, "Test") {
				helpers[dir] = append(helpers[dir], fn.Name.Name)
			}
		}
	})
	goFiles(t, true, func(dir, file string) {
		f := parsed[file]
		bubbles := imported(f, "testing/synctest")
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			bubbles = bubbles || ok && slices.ContainsFunc(helpers[dir], func(h string) bool { return calls(fn, h) })
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "Sleep" || bubbles {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "time" {
				t.Errorf("%s sleeps and has no synctest bubble", file)
			}
			return true
		})
	})
}

func imported(f *ast.File, path string) bool {
	return slices.ContainsFunc(f.Imports, func(i *ast.ImportSpec) bool { return i.Path.Value == `"`+path+`"` })
}
