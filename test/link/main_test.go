// Package link measures Culvert on an emulated WAN link, with the real binary, and
// plain TCP or plain routing beside it on the same link in the same run. See
// docs/performance.md. It needs root.
//
//	go test -run '^$' -bench . -benchtime 5x ./test/link
//
// Each iteration is a round in which all that is compared has its turn. Figures are
// medians over the rounds, and are printed as tables at the end.
package link

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"culvert/test/lab"
)

func TestMain(m *testing.M) {
	m.Run() // goleak has no say: lab keeps a thread that starts processes
	tables.print()
}

// require skips a benchmark where it cannot run, and says why; with
// CULVERT_E2E=require it fails it.
func require(b *testing.B) {
	b.Helper()
	lab.Require(b)
	lab.Culvert(b)
}

// tables are what is printed at the end.
var tables results

type results struct {
	mu  sync.Mutex
	all []*table
}

// A table is a title, column heads, and rows.
type table struct {
	title string
	rows  [][]string
}

// add adds a row to the table of a title, and the heads before the first.
func (r *results) add(title string, heads, row []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.all, func(t *table) bool { return t.title == title })
	if i < 0 {
		i = len(r.all)
		r.all = append(r.all, &table{title, [][]string{heads}})
	}
	r.all[i].rows = append(r.all[i].rows, row)
}

func (r *results) print() {
	for _, t := range r.all {
		_, _ = fmt.Fprintf(os.Stdout, "\n%s\n\n", t.title)
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		for _, row := range t.rows {
			_, _ = fmt.Fprintln(w, "  "+strings.Join(row, "\t"))
		}
		_ = w.Flush()
	}
}

// median of what was measured in several rounds.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
