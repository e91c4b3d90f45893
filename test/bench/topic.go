package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
)

// A topic is one table: rows that are measured in turns, round by round.
type topic struct {
	name, title string
	columns     []string
	rows        []*row
	bounds      []bound
	// known is what the peers' first column was where this project's aims were
	// set, see [peer].
	known  map[string]float64
	memory bool // the first column is no time
	close  func() error
}

// A row is one of those that are compared.
type row struct {
	name    string
	measure func(ctx context.Context) ([]float64, error) // one value a column
	of      measureOf                                    // the same for a proxy that measure knows
	rounds  [][]float64
	err     error // why it is out
}

// A bound is what a row's first column must hold.
type bound struct {
	row, beside string // beside is another row; "" for an absolute bound
	column      int
	most, aim   float64 // aim 0 is none
}

// run measures all rows, in another order each round.
func (t *topic) run(ctx context.Context, rounds int) {
	for i := range rounds {
		for j := range t.rows {
			r := t.rows[(i+j)%len(t.rows)]
			if r.err != nil {
				continue
			}
			values, err := r.measure(ctx)
			if ctx.Err() != nil {
				return
			}
			if err == nil && len(values) != len(t.columns) {
				err = fmt.Errorf("%d values for %d columns", len(values), len(t.columns))
			}
			if err != nil {
				r.err = err
				continue
			}
			r.rounds = append(r.rounds, values)
		}
	}
}

// median returns the middle of a column, and its least and greatest.
func (r *row) median(column int) (middle, least, greatest float64) {
	values := make([]float64, len(r.rounds))
	for i, round := range r.rounds {
		values[i] = round[column]
	}
	slices.Sort(values)
	n := len(values)
	middle = values[n/2]
	if n%2 == 0 {
		middle = (values[n/2-1] + middle) / 2
	}
	return middle, values[0], values[n-1]
}

func (t *topic) row(name string) *row {
	i := slices.IndexFunc(t.rows, func(r *row) bool { return r.name == name })
	if i < 0 {
		return &row{name: name, err: errors.New("there is no such row")}
	}
	return t.rows[i]
}

// report tells what came out. Its error names rows that failed; a bound that is
// not held is not one.
func (t *topic) report() (string, error) {
	var out strings.Builder
	fmt.Fprintf(&out, "\n%s: %s\n", t.name, t.title)
	w := tabwriter.NewWriter(&out, 0, 0, 3, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(w, "\t%s\tlowest to highest\t\n", strings.Join(t.columns, "\t"))
	var failed []error
	var why strings.Builder
	for _, r := range t.rows {
		if r.err != nil {
			failed = append(failed, fmt.Errorf("%s: %s: %w", t.name, r.name, r.err))
			fmt.Fprintf(&why, "  FAILED  %s: %v\n", r.name, r.err)
			continue
		}
		_, _ = fmt.Fprintf(w, "%s\t", r.name)
		for i := range t.columns {
			middle, _, _ := r.median(i)
			_, _ = fmt.Fprintf(w, "%s\t", figure(middle))
		}
		_, least, greatest := r.median(0)
		_, _ = fmt.Fprintf(w, "%s to %s\t\n", figure(least), figure(greatest))
	}
	_ = w.Flush() // a builder takes everything
	out.WriteString(why.String())
	for _, b := range t.bounds {
		out.WriteString("  " + t.judge(b) + "\n")
	}
	return out.String(), errors.Join(failed...)
}

// judge tells whether a bound is held.
func (t *topic) judge(b bound) string {
	ours, theirs := t.row(b.row), &row{}
	what, value := fmt.Sprintf("%s, %s", b.row, t.columns[b.column]), 0.0
	if b.beside != "" {
		theirs, what = t.row(b.beside), fmt.Sprintf("%s / %s", b.row, b.beside)
	}
	if ours.err != nil || theirs.err != nil {
		return fmt.Sprintf("NOT SHOWN  %s: at most %s", what, figure(b.most)) // the row says why
	}
	value, _, _ = ours.median(b.column)
	if b.beside != "" {
		other, _, _ := theirs.median(b.column)
		value /= other
	}
	verdict := "holds "
	if value > b.most {
		verdict = "MISSED"
	}
	aim := ""
	if b.aim != 0 {
		aim = ", aim " + figure(b.aim)
	}
	return fmt.Sprintf("%s  %s: %s (at most %s%s)", verdict, what, figure(value), figure(b.most), aim)
}

// figure prints three digits or so.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
