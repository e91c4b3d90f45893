package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
)

// maxFile bounds a configuration file, in bytes: 5,000 peers are about 500 KB.
const maxFile = 16 << 20

// A decoder reads one file and collects its faults.
type decoder struct {
	file   string
	src    []byte
	o      Options
	faults Faults
	// anyProfile: server.profile is faulty, and so it is not known which
	// services there are.
	anyProfile bool
	asked      func(path string) // for tests: each attribute that is looked for
}

// open parses a file. The error is for a file in which nothing can be looked
// at; other faults are collected.
func open(file string, o Options) (*decoder, *block, error) {
	src, err := readFile(file)
	d := &decoder{file: file, src: src, o: o}
	if err != nil {
		return nil, nil, Faults{{File: file, Summary: err.Error(), Hint: "give the path of a configuration file"}}
	}
	parsed, diags := hclsyntax.ParseConfig(src, file, hcl.InitialPos)
	whole := true
	for _, diag := range diags {
		at := hcl.Range{Start: hcl.InitialPos}
		if diag.Subject != nil {
			at = *diag.Subject
		}
		d.fault(at, "", "%s: %s", strings.ToLower(diag.Summary), oneLine(diag.Detail))
		// A key given twice leaves the rest readable.
		whole = whole && diag.Summary == "Attribute redefined"
	}
	body, ok := parsed.Body.(*hclsyntax.Body)
	if !whole || !ok {
		return nil, nil, d.result()
	}
	root := &block{d: d, body: body, at: hcl.Range{Start: hcl.InitialPos}}
	return d, root, nil
}

func readFile(file string) ([]byte, error) {
	src, err := readAtMost(file, maxFile)
	if path, ok := errors.AsType[*os.PathError](err); ok {
		err = path.Err // the path stands before the fault already
	}
	if err != nil {
		return nil, fmt.Errorf("read the file: %w", err)
	}
	return src, nil
}

// readAtMost does not ask for the size first: a device or a pipe tells none.
func readAtMost(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	src, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(src)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return src, err
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// result is the collected faults as an error, nil without any.
func (d *decoder) result() error {
	if len(d.faults) == 0 {
		return nil
	}
	return d.faults.sorted()
}

// A block is a body that is being read. What was asked for is known; finish
// tells what else there is.
type block struct {
	d     *decoder
	name  string // how faults call it; "" for the file
	path  string // of its attributes, as Attributes has it
	label string
	body  *hclsyntax.Body
	at    hcl.Range // where it begins
	named hcl.Range // of the label; of the block's type where there is none

	noLabel bool // it should have a label, which has been told

	keys  []string // known attributes
	kinds []string // known blocks

	// elsewhere are attributes of the other kind of file, and a hint for each.
	elsewhere map[string]string
}

func (b *block) in() string {
	if b.name == "" {
		return ""
	}
	return " in " + b.name
}

// A value is an attribute as it was given.
type value struct {
	at  hcl.Range // of the value; of the block where there is none
	set bool
	ok  bool // of the type that was wanted
}

// know notes that an attribute may be here.
func (b *block) know(key string) {
	b.keys = append(b.keys, key)
	if b.d.asked != nil {
		b.d.asked(b.path + key)
	}
}

// eval returns the value of an attribute, and notes what keeps it from having
// one.
func (b *block) eval(key string) (cty.Value, value) {
	b.know(key)
	attr := b.body.Attributes[key]
	if attr == nil {
		return cty.NilVal, value{at: b.at}
	}
	at := attr.Expr.Range()
	if bad := notLiteral(attr.Expr); bad != nil {
		b.d.expression(key, bad)
		return cty.NilVal, value{at: at, set: true}
	}
	v, diags := attr.Expr.Value(&hcl.EvalContext{Functions: b.d.functions()})
	for _, diag := range diags {
		where := at
		if diag.Subject != nil {
			where = *diag.Subject
		}
		b.d.fault(where, "", "%s: %s", key, oneLine(diag.Detail))
	}
	if diags.HasErrors() || !v.IsWhollyKnown() {
		return cty.NilVal, value{at: at, set: true}
	}
	return v, value{at: at, set: true}
}

// expression notes a value that is more than a literal or a function call.
func (d *decoder) expression(key string, bad hclsyntax.Expression) {
	hint := `values are literals, env("NAME") and hostname()`
	if word, ok := bad.(*hclsyntax.ScopeTraversalExpr); ok && len(word.Traversal) == 1 {
		hint = fmt.Sprintf("write %q, in quotes", word.Traversal.RootName())
	}
	d.fault(bad.Range(), hint, "%s is an expression", key)
}

// notLiteral returns the part of an expression that is more than a literal or a
// function call. Where HCL would convert between numbers, truth values and
// text, in templates and operators, it takes what needs no conversion alone.
func notLiteral(e hclsyntax.Expression) hclsyntax.Expression {
	var parts []hclsyntax.Expression
	switch e := e.(type) {
	case *hclsyntax.LiteralValueExpr:
	case *hclsyntax.TemplateExpr:
		parts = e.Parts
		for _, p := range parts {
			if lit, ok := p.(*hclsyntax.LiteralValueExpr); ok && !lit.Val.Type().Equals(cty.String) {
				return p
			}
		}
	case *hclsyntax.TemplateWrapExpr:
		parts = []hclsyntax.Expression{e.Wrapped}
	case *hclsyntax.TupleConsExpr:
		parts = e.Exprs
	case *hclsyntax.FunctionCallExpr:
		parts = e.Args
	case *hclsyntax.UnaryOpExpr:
		if lit, ok := e.Val.(*hclsyntax.LiteralValueExpr); !ok || e.Op != hclsyntax.OpNegate || !lit.Val.Type().Equals(cty.Number) {
			return e
		}
	default:
		return e
	}
	for _, p := range parts {
		if bad := notLiteral(p); bad != nil {
			return bad
		}
	}
	return nil
}

func (d *decoder) functions() map[string]function.Function {
	text := func(f func(args []cty.Value) (string, error), params ...function.Parameter) function.Function {
		return function.New(&function.Spec{
			Params: params, Type: function.StaticReturnType(cty.String),
			Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
				s, err := f(args)
				return cty.StringVal(s), err
			},
		})
	}
	return map[string]function.Function{
		"env": text(func(args []cty.Value) (string, error) {
			if !args[0].Type().Equals(cty.String) {
				return "", function.NewArgErrorf(0, "the name must be a string")
			}
			name := args[0].AsString()
			if d.o.Env != nil {
				if v, ok := d.o.Env(name); ok {
					return v, nil
				}
			}
			return "", fmt.Errorf("the environment variable %s is not set", name)
		}, function.Parameter{Name: "name", Type: cty.DynamicPseudoType}), // HCL would convert to a string
		"hostname": text(func([]cty.Value) (string, error) {
			if d.o.Hostname == nil {
				return "", errors.New("the host's name is not known")
			}
			return d.o.Hostname()
		}),
	}
}

// typed evaluates an attribute and notes a value of another type than is wanted.
func (b *block) typed(key string, want cty.Type, called, example string) (cty.Value, value) {
	v, at := b.eval(key)
	if v == cty.NilVal {
		return v, at
	}
	at.ok = !v.IsNull() && v.Type().Equals(want)
	if !at.ok {
		got := "null"
		if !v.IsNull() {
			got = article(v.Type().FriendlyName())
		}
		b.d.fault(at.at, "write "+example, "%s%s is %s, want %s", key, b.in(), got, called)
	}
	return v, at
}

func article(noun string) string {
	if strings.ContainsRune("aeiou", rune(noun[0])) {
		return "an " + noun
	}
	return "a " + noun
}

// text reads a string; "" where it is not set or faulty.
func (b *block) text(key string) (string, value) {
	v, at := b.typed(key, cty.String, "a string", key+` = "..."`)
	if !at.ok {
		return "", at
	}
	return v.AsString(), at
}

// required reads a string that must be there and not be empty.
func (b *block) required(key, example string) (string, value) {
	s, at := b.text(key)
	switch {
	case !at.set:
		b.d.fault(b.at, fmt.Sprintf("add %s = %q", key, example), "%s is missing%s", key, b.in())
	case at.ok && s == "":
		b.d.fault(at.at, fmt.Sprintf("write %s = %q", key, example), "%s%s is empty", key, b.in())
		at.ok = false
	}
	return s, at
}

func (b *block) boolean(key string, def bool) bool {
	v, at := b.typed(key, cty.Bool, "true or false", key+" = true")
	if !at.ok {
		return def
	}
	return v.True()
}

// number reads a whole number within limits; 0 where it is not set or faulty.
func (b *block) number(key string, low, high int64) (int64, value) {
	return b.whole(key, low, fmt.Sprintf("a whole number from %d to %d", low, high), func(n int64) bool { return low <= n && n <= high })
}

// whole reads a whole number that fits; 0 where it is not set or faulty.
func (b *block) whole(key string, example int64, hint string, fits func(int64) bool) (int64, value) {
	v, at := b.typed(key, cty.Number, "a number", fmt.Sprintf("%s = %d", key, example))
	if !at.ok {
		return 0, at
	}
	n, accuracy := v.AsBigFloat().Int64()
	if accuracy != big.Exact || !fits(n) {
		// As it was written: 1e600000000 would have as many digits.
		b.d.fault(at.at, hint, "%s%s is %s", key, b.in(), oneLine(string(at.at.SliceBytes(b.d.src))))
		at.ok = false
		return 0, at
	}
	return n, at
}

// An item is one element of a list.
type item struct {
	text string
	at   hcl.Range
}

// list reads a list of strings.
func (b *block) list(key string) ([]item, value) {
	v, at := b.eval(key)
	if v == cty.NilVal {
		return nil, at
	}
	tuple, ok := b.body.Attributes[key].Expr.(*hclsyntax.TupleConsExpr)
	if !ok || v.IsNull() || !v.Type().IsTupleType() {
		b.d.fault(at.at, key+` = ["..."]`, "%s%s is not a list of strings", key, b.in())
		return nil, at
	}
	var out []item
	for i, e := range v.AsValueSlice() {
		at := tuple.Exprs[i].Range()
		if e.IsNull() || !e.Type().Equals(cty.String) {
			b.d.fault(at, key+` = ["..."]`, "an element of %s%s is not a string", key, b.in())
			continue
		}
		out = append(out, item{e.AsString(), at})
	}
	at.ok = true
	return out, at
}

// oneOf reads a word of a closed set; def where it is not set or faulty.
func (b *block) oneOf(key, def string, words ...string) (string, value) {
	s, at := b.text(key)
	if slices.Contains(words, s) {
		return s, at
	}
	if at.ok {
		b.d.fault(at.at, didYouMean(s, words), "%s%s is %q", key, b.in(), s)
		at.ok = false
	}
	return def, at
}

// one reads a block that has no label and may be given once. What is in further
// ones is read for its faults alone. It returns nil where there is none.
func (b *block) one(kind string, read func(*block)) *block {
	all := b.blocks(kind, false)
	for i, one := range all {
		if i > 0 {
			b.d.fault(one.at, "keep one of them", "%s is given twice, first on line %d", kind, all[0].at.Start.Line)
		}
		read(one)
		one.finish()
	}
	if len(all) == 0 {
		return nil
	}
	return all[0]
}

// many reads every block of a kind that has a label.
func (b *block) many(kind string, read func(*block)) {
	for _, one := range b.blocks(kind, true) {
		read(one)
		one.finish()
	}
}

// blocks returns the blocks of a kind, and notes labels that are missing or too
// many: what is in them is still read.
func (b *block) blocks(kind string, labelled bool) []*block {
	b.kinds = append(b.kinds, kind)
	var out []*block
	for _, hb := range b.body.Blocks {
		if hb.Type != kind {
			continue
		}
		one := &block{d: b.d, name: kind, path: b.path + kind + ".", body: hb.Body, at: hb.TypeRange, named: hb.TypeRange}
		labels := hb.Labels
		switch {
		case labelled && len(labels) == 0:
			b.d.fault(hb.TypeRange, fmt.Sprintf("write %s \"NAME\" { ... }", kind), "%s has no label", kind)
			one.noLabel = true
		case labelled:
			one.label, one.named = labels[0], hb.LabelRanges[0]
			one.name = fmt.Sprintf("%s %q", kind, one.label)
			labels, hb.LabelRanges = labels[1:], hb.LabelRanges[1:]
		}
		if len(labels) > 0 {
			b.d.fault(hb.LabelRanges[0], "take it away", "%s has a label too many, %q", kind, labels[0])
		}
		out = append(out, one)
	}
	return out
}

// finish notes every key and block that was not asked for.
func (b *block) finish() {
	for key, attr := range b.body.Attributes {
		if slices.Contains(b.keys, key) {
			continue
		}
		hint := didYouMean(key, slices.Concat(b.keys, b.kinds))
		if slices.Contains(b.kinds, key) {
			hint = fmt.Sprintf("write %s { ... }, without =", key)
		}
		hint = cmp.Or(b.elsewhere[key], hint)
		b.d.fault(attr.NameRange, hint, "unknown key %q%s", key, b.in())
	}
	for _, hb := range b.body.Blocks {
		if slices.Contains(b.kinds, hb.Type) {
			continue
		}
		hint := didYouMean(hb.Type, slices.Concat(b.kinds, b.keys))
		if slices.Contains(b.keys, hb.Type) {
			hint = fmt.Sprintf("write %s = ...", hb.Type)
		}
		b.d.fault(hb.TypeRange, hint, "unknown block %q%s", hb.Type, b.in())
	}
}
