// Command tables makes tables of what `go test -bench` prints, one a topic.
//
//	go test -run '^$' -bench . ./... | go run ./test/tables
//
// A topic is a benchmark that has cases, or all others of a package. What is no
// result, as a failure, a skip or a log, is printed as it came, and so are the tables of
// a package that prints its own. The end is not told by the exit code, which is that of
// go test: a pipe keeps it with the shell's pipefail.
package main

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

func main() {
	if err := write(os.Stdout, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "tables:", err)
		os.Exit(1)
	}
}

// maxLine bounds a line of go test's output, in bytes.
const maxLine = 1 << 20

// write reads the output of go test and prints what is of a package as soon as that ends.
func write(w io.Writer, r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	out := bufio.NewWriter(w)
	var p pkg
	for lines.Scan() {
		if p.take(lines.Text()) {
			p.print(out)
			p = pkg{}
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
	p.print(out) // of a run that was cut off
	return cmp.Or(out.Flush(), lines.Err())
}

// A pkg is what one package has printed so far.
type pkg struct {
	name   string
	topics []*topic
	own    []string // lines that are no results: failures, logs
	passed bool     // all benchmarks have run
	tables bool     // and then it went on: these are tables of its own
}

// A topic is one table.
type topic struct {
	title string
	units []string // in the order in which they came
	cases []result
}

// A result is a case's figures by unit.
type result struct {
	name    string
	figures map[string]string
}

// ends matches the line with which go test ends what is of a package.
var ends = regexp.MustCompile(`^(ok|FAIL|---|\?)?\s*\t(\S+)\s`)

// take takes one line, and tells whether it is the last of a package.
func (p *pkg) take(line string) bool {
	switch head, rest, _ := strings.Cut(line, ":"); head {
	case "pkg":
		p.name = strings.TrimSpace(rest)
		return false
	case "goos", "goarch", "cpu":
		return false
	}
	if line == "PASS" {
		p.passed = true
		return false
	}
	if m := ends.FindStringSubmatch(line); m != nil && m[1] != "---" {
		p.name = cmp.Or(p.name, m[2])
		if m[1] == "FAIL" {
			p.own = append(p.own, line)
		}
		return true
	}
	if name, figures := parse(line); figures != nil {
		p.add(name, figures)
		return false
	}
	p.tables = p.tables || p.passed && strings.TrimSpace(line) != ""
	p.own = append(p.own, line)
	return false
}

// processors matches what go test writes behind a benchmark's name.
var processors = regexp.MustCompile(`-\d+$`)

// parse returns a benchmark's name and its figures, in turns a value and its unit; nil for a line
// that is no result.
func parse(line string) (name string, figures []string) {
	fields := strings.Fields(line)
	name, ok := strings.CutPrefix(line, "Benchmark")
	if !ok || len(fields) < 4 || len(fields)%2 != 0 {
		return "", nil
	}
	name, _, _ = strings.Cut(name, " ")
	name, _, _ = strings.Cut(name, "\t")
	return processors.ReplaceAllString(name, ""), fields[2:]
}

func (p *pkg) add(name string, figures []string) {
	title, of, cased := strings.Cut(name, "/")
	if !cased {
		title, of = "", name
	}
	i := slices.IndexFunc(p.topics, func(t *topic) bool { return t.title == title })
	if i < 0 {
		i = len(p.topics)
		p.topics = append(p.topics, &topic{title: title})
	}
	t := p.topics[i]
	r := result{strings.ReplaceAll(of, "_", " "), make(map[string]string)}
	for pair := range slices.Chunk(figures, 2) {
		value, unit := pair[0], pair[1]
		r.figures[unit] = value
		if !slices.Contains(t.units, unit) {
			t.units = append(t.units, unit)
		}
	}
	t.cases = append(t.cases, r)
}

// print prints the tables of a package, or what it has printed in their place.
func (p *pkg) print(w io.Writer) {
	if !p.tables {
		for _, t := range p.topics {
			heading := strings.TrimPrefix(p.name, "culvert/")
			if t.title != "" {
				heading += ": " + t.title
			}
			_, _ = fmt.Fprintf(w, "\n%s\n\n", heading)
			t.print(w)
		}
	}
	for _, line := range p.own {
		_, _ = fmt.Fprintln(w, line)
	}
}

// widest is how many units stand beside each other: with more, cases do.
const widest = 5

func (t *topic) print(w io.Writer) {
	var rows [][]string
	if len(t.units) <= widest {
		rows = append(rows, append([]string{""}, t.units...))
		for _, c := range t.cases {
			row := []string{c.name}
			for _, unit := range t.units {
				row = append(row, c.figures[unit])
			}
			rows = append(rows, row)
		}
	} else {
		head := []string{""}
		for _, c := range t.cases {
			head = append(head, c.name)
		}
		rows = append(rows, head)
		for _, unit := range t.units {
			row := []string{unit}
			for _, c := range t.cases {
				row = append(row, c.figures[unit])
			}
			rows = append(rows, row)
		}
	}
	align(w, rows)
}

// align prints rows in columns, the first to the left and the others to the right.
func align(w io.Writer, rows [][]string) {
	wide := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			wide[i] = max(wide[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		fmt.Fprintf(&line, "  %-*s", wide[0], row[0])
		for i, cell := range row[1:] {
			fmt.Fprintf(&line, "   %*s", wide[i+1], cell)
		}
		_, _ = fmt.Fprintln(w, strings.TrimRight(line.String(), " ")) // a buffer, whose Flush tells of an error
	}
}
