// Package interop proves that servers work unchanged behind sidecars: the real
// Consul and Nomad, as their projects publish them, in network namespaces. They
// take minutes to build, so that these tests run on demand: `make interop`.
package interop

import (
	"os"
	"testing"

	"culvert/test/lab"
)

// require skips a test unless the servers are wanted, and says why.
func require(t *testing.T) {
	t.Helper()
	if os.Getenv("CULVERT_INTEROP") != "require" {
		t.Skip("skipped: Consul and Nomad take minutes to build; `make interop` builds them, sets CULVERT_INTEROP=require and runs this")
	}
	if lack := lab.Missing(); lack != "" {
		t.Fatalf("CULVERT_INTEROP=require: %s", lack)
	}
}
