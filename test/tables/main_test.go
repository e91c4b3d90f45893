package main

import (
	"errors"
	"strings"
	"testing"
)

// What go test prints, cut short: two packages with benchmarks, one of which has
// cases, one without any, one that prints tables of its own, and one that fails.
const printed = `goos: linux
goarch: amd64
pkg: culvert/packet
cpu: some
BenchmarkSend-2      	 1000	       123.4 ns/op	       0 B/op	       0 allocs/op
BenchmarkReader/one_record-2 	 10	 5000 ns/op	 40.5 MB/s
BenchmarkReader/bytes=7-2 	 20	 70000 ns/op
BenchmarkReceive-2   	 2000	        99.0 ns/op	       0 B/op	       0 allocs/op
PASS
ok  	culvert/packet	3.210s
PASS
ok  	culvert/admin	0.021s
?   	culvert/test/scrape	[no test files]
goos: linux
pkg: culvert/test/scale
BenchmarkPeers/10_of_10-2 	 1	 1.5 a	 2 b	 3 c	 4 d	 5 e	 6 f
PASS
ok  	culvert/test/scale	40.1s
pkg: culvert/test/link
BenchmarkStream/cubic-2 	 1	 181.0 ours-Mbit/s
PASS

A stream

         plain TCP
  cubic  168
ok  	culvert/test/link	61.0s
pkg: culvert/capture
BenchmarkLost-2 	 1	 7 ns/op
--- FAIL: BenchmarkBind
    bench_test.go:80: no route
BenchmarkUnfinished-2 	FAIL
exit status 1
FAIL	culvert/capture	0.100s
FAIL
`

const wanted = `
packet

            ns/op   B/op   allocs/op
  Send      123.4      0           0
  Receive    99.0      0           0

packet: Reader

               ns/op   MB/s
  one record    5000   40.5
  bytes=7      70000

test/scale: Peers

      10 of 10
  a        1.5
  b          2
  c          3
  d          4
  e          5
  f          6

A stream

         plain TCP
  cubic  168

capture

         ns/op
  Lost       7
--- FAIL: BenchmarkBind
    bench_test.go:80: no route
BenchmarkUnfinished-2 	FAIL
exit status 1
FAIL	culvert/capture	0.100s
FAIL
`

func TestTables(t *testing.T) {
	var b strings.Builder
	if err := write(&b, strings.NewReader(printed)); err != nil {
		t.Fatal(err)
	}
	if b.String() != wanted {
		t.Errorf("printed:\n%s\nwant:\n%s", b.String(), wanted)
	}
}

// What a run that is killed has measured is not lost.
func TestCutOff(t *testing.T) {
	var b strings.Builder
	if err := write(&b, strings.NewReader("pkg: culvert/mux\nBenchmarkAccept-2 \t 5 \t 12 ns/op\n")); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "Accept      12") {
		t.Errorf("printed:\n%s", b.String())
	}
}

type full struct{}

var errFull = errors.New("full")

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestNowhereToWrite(t *testing.T) {
	if err := write(full{}, strings.NewReader(printed)); !errors.Is(err, errFull) {
		t.Errorf("the error is %v, want %v", err, errFull)
	}
}
