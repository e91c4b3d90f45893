package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// A Fault is one thing that is wrong in a configuration.
type Fault struct {
	File    string
	Line    int // from 1; 0 for a flag or a file that cannot be read
	Column  int // from 1, in characters
	Summary string
	Hint    string // what would be right; may be empty
}

func (f Fault) String() string {
	where := f.File
	if f.Line > 0 {
		where = fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column)
	}
	if f.Hint == "" {
		return fmt.Sprintf("%s: %s", where, f.Summary)
	}
	return fmt.Sprintf("%s: %s; %s", where, f.Summary, f.Hint)
}

// Faults are all that is wrong in a configuration, in the order of the file.
type Faults []Fault

// Error prints one fault a line.
func (fs Faults) Error() string {
	lines := make([]string, len(fs))
	for i, f := range fs {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// ExitCode is 2: the configuration is at fault.
func (Faults) ExitCode() int { return 2 }

func (fs Faults) sorted() Faults {
	slices.SortStableFunc(fs, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return slices.Compact(fs)
}

// fault notes something wrong at a place.
func (d *decoder) fault(at hcl.Range, hint, format string, args ...any) {
	f := Fault{File: d.file, Line: at.Start.Line, Column: at.Start.Column, Summary: fmt.Sprintf(format, args...), Hint: hint}
	if at.Start.Line == 0 { // a flag has no lines
		f.File = at.Filename
	}
	d.faults = append(d.faults, f)
}

// flag is the place of a value that came from the command line.
func flag(name string) hcl.Range { return hcl.Range{Filename: name} }

// nearest returns the word that was probably meant, "" if none is near.
func nearest(word string, known []string) string {
	best, distance := "", len(word)/3+2
	for _, k := range known {
		if n := editDistance(word, k); n < distance {
			best, distance = k, n
		}
	}
	return best
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// didYouMean is a hint for an unknown word among known ones.
func didYouMean(word string, known []string) string {
	if best := nearest(word, known); best != "" {
		return fmt.Sprintf("did you mean %q?", best)
	}
	return "one of " + strings.Join(known, ", ")
}
