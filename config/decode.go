package config

import (
	"errors"
	"fmt"
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
	o      Options
	faults Faults
	asked  func(path string) // for tests: each attribute that is looked for
}

// open parses a file. The error is for a file in which nothing can be looked
// at; other faults are collected.
func open(file string, o Options) (*decoder, *block, error) {
	d := &decoder{file: file, o: o}
	src, err := readFile(file)
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
	st, err := os.Stat(file)
	if err != nil {
		if path, ok := errors.AsType[*os.PathError](err); ok {
			err = path.Err // the path stands before the fault already
		}
		return nil, fmt.Errorf("read the file: %w", err)
	}
	if st.Size() > maxFile {
		return nil, fmt.Errorf("read the file: %d bytes, at most %d", st.Size(), maxFile)
	}
	src, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the file: %w", err)
	}
	return src, nil
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
	named hcl.Range // of the label

	keys  []string // known attributes
	kinds []string // known blocks
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
}

// eval returns the value of an attribute, and notes what keeps it from having
// one.
func (b *block) eval(key string) (cty.Value, value) {
	b.keys = append(b.keys, key)
	if b.d.asked != nil {
		b.d.asked(b.path + key)
	}
	attr := b.body.Attributes[key]
	if attr == nil {
		return cty.NilVal, value{at: b.at}
	}
	at := attr.Expr.Range()
	if bad := notLiteral(attr.Expr); bad != nil {
		b.d.fault(bad.Range(), `values are literals, env("NAME") and hostname()`, "%s is an expression", key)
		return cty.NilVal, value{at: at, set: true}
	}
	v, diags := attr.Expr.Value(&hcl.EvalContext{Functions: b.d.functions()})
	for _, diag := range diags {
		b.d.fault(at, "", "%s: %s", key, oneLine(diag.Detail))
	}
	if diags.HasErrors() || !v.IsWhollyKnown() {
		return cty.NilVal, value{at: at, set: true}
	}
	return v, value{at: at, set: true}
}

// notLiteral returns the part of an expression that is more than a literal or a
// function call.
func notLiteral(e hclsyntax.Expression) hclsyntax.Expression {
	var parts []hclsyntax.Expression
	switch e := e.(type) {
	case *hclsyntax.LiteralValueExpr:
	case *hclsyntax.TemplateExpr:
		parts = e.Parts
	case *hclsyntax.TemplateWrapExpr:
		parts = []hclsyntax.Expression{e.Wrapped}
	case *hclsyntax.TupleConsExpr:
		parts = e.Exprs
	case *hclsyntax.FunctionCallExpr:
		parts = e.Args
	case *hclsyntax.UnaryOpExpr:
		parts = []hclsyntax.Expression{e.Val}
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
			name := args[0].AsString()
			if d.o.Env != nil {
				if v, ok := d.o.Env(name); ok {
					return v, nil
				}
			}
			return "", fmt.Errorf("the environment variable %s is not set", name)
		}, function.Parameter{Name: "name", Type: cty.String}),
		"hostname": text(func([]cty.Value) (string, error) {
			if d.o.Hostname == nil {
				return "", errors.New("the host's name is not known")
			}
			return d.o.Hostname()
		}),
	}
}

// typed notes a value of another type than is wanted.
func (b *block) typed(key string, v cty.Value, at value, want cty.Type, called, example string) bool {
	if v == cty.NilVal {
		return false
	}
	if v.IsNull() || !v.Type().Equals(want) {
		got := v.Type().FriendlyName()
		if v.IsNull() {
			got = "null"
		}
		b.d.fault(at.at, "write "+example, "%s%s is %s, want %s", key, b.in(), article(got), called)
		return false
	}
	return true
}

func article(noun string) string {
	if strings.ContainsRune("aeiou", rune(noun[0])) {
		return "an " + noun
	}
	return "a " + noun
}

// text reads a string; "" where it is not set or faulty.
func (b *block) text(key string) (string, value) {
	v, at := b.eval(key)
	if !b.typed(key, v, at, cty.String, "a string", key+` = "..."`) {
		return "", at
	}
	return v.AsString(), at
}

// required reads a string that must be there.
func (b *block) required(key, example string) (string, value) {
	s, at := b.text(key)
	if !at.set {
		b.d.fault(b.at, fmt.Sprintf("add %s = %q", key, example), "%s is missing%s", key, b.in())
	}
	return s, at
}

func (b *block) boolean(key string, def bool) bool {
	v, at := b.eval(key)
	if !at.set || !b.typed(key, v, at, cty.Bool, "true or false", key+" = true") {
		return def
	}
	return v.True()
}

// number reads a whole number within limits; 0 where it is not set or faulty.
func (b *block) number(key string, low, high int64) (int64, value) {
	v, at := b.eval(key)
	if !b.typed(key, v, at, cty.Number, "a number", fmt.Sprintf("%s = %d", key, low)) {
		return 0, at
	}
	n, accuracy := v.AsBigFloat().Int64()
	if accuracy != big.Exact || n < low || n > high {
		b.d.fault(at.at, fmt.Sprintf("a whole number from %d to %d", low, high), "%s%s is %s", key, b.in(), v.AsBigFloat().Text('f', -1))
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
	return out, at
}

// oneOf reads a word of a closed set; def where it is not set or faulty.
func (b *block) oneOf(key, def string, words ...string) (string, value) {
	before := len(b.d.faults)
	s, at := b.text(key)
	switch {
	case !at.set || len(b.d.faults) > before:
	case slices.Contains(words, s):
		return s, at
	default:
		b.d.fault(at.at, didYouMean(s, words), "%s%s is %q", key, b.in(), s)
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
		hint := didYouMean(key, append(slices.Clone(b.keys), b.kinds...))
		if slices.Contains(b.kinds, key) {
			hint = fmt.Sprintf("write %s { ... }, without =", key)
		}
		b.d.fault(attr.NameRange, hint, "unknown key %q%s", key, b.in())
	}
	for _, hb := range b.body.Blocks {
		if slices.Contains(b.kinds, hb.Type) {
			continue
		}
		hint := didYouMean(hb.Type, append(slices.Clone(b.kinds), b.keys...))
		if slices.Contains(b.keys, hb.Type) {
			hint = fmt.Sprintf("write %s = ...", hb.Type)
		}
		b.d.fault(hb.TypeRange, hint, "unknown block %q%s", hb.Type, b.in())
	}
}
