package config

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// Ten faults of more than six kinds come back at once, in the order of the
// file, one a line, each with its place, what is wrong and what would be right.
func TestTenFaultsAtOnce(t *testing.T) {
	_, err := LoadSidecar("testdata/ten-faults.hcl", options())
	faults, ok := errors.AsType[Faults](err)
	if !ok {
		t.Fatalf("no faults: %v", err)
	}
	want, err := os.ReadFile("testdata/ten-faults.golden")
	if err != nil {
		t.Fatal(err)
	}
	got := faults.Error() + "\n"
	if got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if n := strings.Count(got, "\n"); n != 10 || len(faults) != 10 {
		t.Errorf("%d faults in %d lines, want ten of each", len(faults), n)
	}
	for _, f := range faults {
		if f.Line == 0 || f.Column == 0 || f.Summary == "" || f.Hint == "" {
			t.Errorf("a fault lacks its place, words or hint: %+v", f)
		}
	}
	if faults.ExitCode() != 2 {
		t.Errorf("exit code %d, want 2", faults.ExitCode())
	}
}
