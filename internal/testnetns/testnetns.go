// Package testnetns runs the tests of a package in a network namespace of their
// own, where they may change whatever they like.
//
//	func TestMain(m *testing.M) { goleak.VerifyTestMain(testnetns.Main(m)) }
//
//	func TestRules(t *testing.T) {
//		testnetns.Require(t)
//		...
//	}
//
// The test binary starts itself again in a new namespace, which needs root and
// ip(8). Without them the tests run where they are, and those that require the
// namespace are skipped, or fail where CULVERT_E2E is "require".
package testnetns

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// inside is set in the process that runs in the namespace.
const inside = "CULVERT_TEST_NETNS"

// host makes a host with a link, eth0, that leads nowhere: there is a route and
// a neighbour for everything, so that what is sent to other hosts leaves.
const host = `
ip link set lo up
ip link add eth0 type veth peer name far
ip addr add 10.1.0.1/24 dev eth0
ip addr add 10.1.0.2/24 dev eth0
ip addr add fd01::1/64 dev eth0 nodad
ip link set eth0 up
ip link set far up
ip neigh add 10.1.0.254 lladdr 02:00:00:00:00:01 dev eth0
ip neigh add fd01::ff lladdr 02:00:00:00:00:01 dev eth0
ip route add default via 10.1.0.254
ip -6 route add default via fd01::ff dev eth0
`

// A Tests is what [testing.M] is: something that runs tests.
type Tests interface{ Run() int }

// Main returns tests that run in the namespace, where the host has the addresses
// 10.1.0.1, 10.1.0.2 and fd01::1 on eth0.
func Main(m Tests) Tests { return entering{m} }

type entering struct{ tests Tests }

// Run runs the tests and returns the process's exit code.
func (e entering) Run() int {
	switch {
	case os.Getenv(inside) != "":
		if out, err := exec.Command("sh", "-ec", host).CombinedOutput(); err != nil { //nolint:noctx // at once
			fmt.Fprintf(os.Stderr, "set up the network namespace: %v\n%s", err, out)
			return 1
		}
		return e.tests.Run()
	case missing() != "":
		return e.tests.Run()
	}
	again := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:noctx,gosec // itself, under the time limit of go test
	again.Env = append(os.Environ(), inside+"=1")
	again.Stdout, again.Stderr = os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := again.Run(); err != nil {
		return 1
	}
	return 0
}

// missing says what there is not.
func missing() string {
	if os.Geteuid() != 0 {
		return "root"
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return "ip(8) of iproute2"
	}
	return ""
}

// Require skips a test that is not in a namespace of its own, or fails it.
func Require(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) != "" {
		return
	}
	if os.Getenv("CULVERT_E2E") == "require" {
		t.Fatalf("needs a network namespace of its own: %s is missing", missing())
	}
	t.Skipf("needs a network namespace of its own: %s is missing", missing())
}
