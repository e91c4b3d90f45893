package link

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"culvert/test/lab"
	"culvert/test/netlab"
)

// serfFor, set to a duration, makes BenchmarkSerf watch for so long, and serfRuns
// how often (3). Before it they join, and serfJoins times more (9): gossip has its turn
// every fifth of a second, so that the time of one join says little.
const (
	serfFor   = "CULVERT_SERF"
	serfRuns  = "CULVERT_SERF_RUNS"
	serfJoins = "CULVERT_SERF_JOINS"
)

const (
	agentsEach = 10 // in each datacenter
	serfTrip   = 50 * time.Millisecond
	serfLoss   = 0.02
	converge   = 2 * time.Minute
)

// Serf is twenty agents in two datacenters on a link that loses packets, twice at
// the same time: behind sidecars, and routed plainly over a link like it. How long
// it takes until all see all, and what they suspect afterwards of members that
// are all well.
func BenchmarkSerf(b *testing.B) {
	watch, err := time.ParseDuration(os.Getenv(serfFor))
	if err != nil {
		b.Skipf("runs for minutes, where %s says for how long: make bench-serf", serfFor)
	}
	require(b)
	runs, joins := number(b, serfRuns, 3), number(b, serfJoins, 9)
	for _, congestion := range congestions {
		var ours, plain []gossip
		for run := range runs + joins {
			b.Run(fmt.Sprintf("%s/%d", congestion, run+1), func(b *testing.B) {
				watch := watch
				if run >= runs {
					watch = 0
				}
				o, p := sideBySide(b, congestion, watch)
				ours, plain = append(ours, o), append(plain, p)
				b.ReportMetric(0, "ns/op")
				for name, g := range map[string]gossip{"ours": o, "plain": p} {
					b.ReportMetric(g.converged.Seconds(), name+"-s")
					b.ReportMetric(float64(g.suspicions), name+"-suspicions")
					b.ReportMetric(float64(g.failures), name+"-failures")
				}
			})
		}
		if len(ours) > 0 {
			serfRows(congestion, watch, ours, plain)
		}
	}
}

// number is a variable of the environment's.
func number(b *testing.B, name string, otherwise int) int {
	b.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		b.Fatalf("%s: %v", name, err)
	}
	return n
}

// A gossip is what came of one federation of agents.
type gossip struct {
	converged            time.Duration // from the first join until all see all
	watched              bool          // afterwards
	suspicions, failures int
}

func serfRows(congestion string, watch time.Duration, ours, plain []gossip) {
	watched := 0
	for _, g := range ours {
		if g.watched {
			watched++
		}
	}
	title := fmt.Sprintf("%d serf agents in two datacenters, %v round trip, %.0f %% loss each way, side by side; joined %d times, watched %d times for %v",
		2*agentsEach, serfTrip, 100*serfLoss, len(ours), watched, watch)
	column := func(all []gossip, f func(gossip) float64, format string) (cell string, sum, mid float64) {
		if len(all) == 0 {
			return "not watched", 0, 0
		}
		var v []float64
		for _, g := range all {
			v = append(v, f(g))
			sum += f(g)
			cell += fmt.Sprintf(format+" ", f(g))
		}
		return cell, sum, median(v)
	}
	seconds := func(g gossip) float64 { return g.converged.Seconds() }
	suspicions := func(g gossip) float64 { return float64(g.suspicions) }
	failures := func(g gossip) float64 { return float64(g.failures) }
	oursTime, _, oursMid := column(ours, seconds, "%.2f")
	plainTime, _, plainMid := column(plain, seconds, "%.2f")
	ours, plain = ours[:watched], plain[:watched] // those come first
	oursSuspicions, oursSum, _ := column(ours, suspicions, "%.0f")
	plainSuspicions, plainSum, _ := column(plain, suspicions, "%.0f")
	oursFailures, _, _ := column(ours, failures, "%.0f")
	plainFailures, _, _ := column(plain, failures, "%.0f")
	ratio := "none to compare with"
	if plainSum > 0 {
		ratio = fmt.Sprintf("%.2f of sums", oursSum/plainSum)
	}
	heads := []string{"", "", "s until all see all", "suspicions", "false failures"}
	tables.add(title, heads, []string{congestion, "plainly routed", plainTime, plainSuspicions, plainFailures})
	tables.add(title, heads, []string{congestion, "through sidecars", oursTime, oursSuspicions, oursFailures})
	tables.add(title, heads, []string{congestion, "ratio", fmt.Sprintf("%.2f of medians", oursMid/plainMid), ratio, ""})
}

// agents are a world's, each with what a join needs.
type agents struct {
	*world
	all []*lab.SerfAgent
}

func sideBySide(b *testing.B, congestion string, watch time.Duration) (ours, plain gossip) {
	b.Helper()
	var both [2]*agents
	for i, bare := range []bool{false, true} {
		w := newWorld(b, plan{
			hosts: [2]int{agentsEach, agentsEach}, way: netlab.Way{Delay: serfTrip / 2, Loss: serfLoss}, congestion: congestion, bare: bare,
		})
		both[i] = &agents{world: w}
		for _, s := range w.servers {
			advertise := s.virtual
			if bare {
				advertise = s.host.Addr
			}
			both[i].all = append(both[i].all, s.host.StartSerf(s.node, s.host.Addr, advertise, `{"log_level": "info"}`))
		}
	}
	var out [2]gossip
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, a := range both {
		wg.Go(func() { out[i].converged, errs[i] = a.join() })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
	before := [2]gossip{both[0].told(), both[1].told()}
	lab.Wait(watch)
	for i, a := range both {
		after := a.told()
		out[i].watched = watch > 0
		out[i].suspicions, out[i].failures = after.suspicions-before[i].suspicions, after.failures-before[i].failures
		a.check()
	}
	return out[0], out[1]
}

// join has all agents join the first at once, and waits until each has seen all.
func (a *agents) join() (time.Duration, error) {
	began := time.Now()
	first := a.all[0].Advertise.String()
	errs := make([]error, len(a.all))
	var wg sync.WaitGroup
	for i, s := range a.servers[1:] {
		wg.Go(func() {
			// As an agent does that was told to retry.
			for {
				if errs[i] = joinOne(s.host, first); errs[i] == nil || time.Since(began) > converge {
					return
				}
				lab.Wait(time.Second)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	for {
		seen := 0
		for _, agent := range a.all {
			if members(agent.Output()) == len(a.all) {
				seen++
			}
		}
		if seen == len(a.all) {
			return time.Since(began), nil
		}
		if time.Since(began) > converge {
			return 0, fmt.Errorf("after %v %d of %d agents have seen all others", converge, seen, len(a.all))
		}
		lab.Wait(20 * time.Millisecond)
	}
}

var (
	joinLine    = regexp.MustCompile(`EventMemberJoin: (\S+)`)
	suspectLine = regexp.MustCompile(`memberlist: Suspect \S+ has failed`)
	failedLine  = regexp.MustCompile(`EventMemberFailed: `)
)

// members is how many different ones an agent says have joined.
func members(output string) int {
	names := make(map[string]bool)
	for _, m := range joinLine.FindAllStringSubmatch(output, -1) {
		names[m[1]] = true
	}
	return len(names)
}

// told is what all agents have said so far of members that are well.
func (a *agents) told() gossip {
	var g gossip
	for _, agent := range a.all {
		out := agent.Output()
		g.suspicions += len(suspectLine.FindAllString(out, -1))
		g.failures += len(failedLine.FindAllString(out, -1))
	}
	return g
}

// joinOne asks an agent by its control address, as `serf join` does: starting
// that forty times at once would be what is measured. The protocol is MessagePack:
// maps of few entries, short strings and small numbers.
func joinOne(h *lab.Host, address string) error {
	c, err := h.Dial("tcp", "127.0.0.1:7373")
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(longest))
	short := func(s string) []byte { return append([]byte{0xa0 | byte(len(s))}, s...) } // up to 31 bytes
	request := bytes.Join([][]byte{
		{0x82},
		short("Command"), short("handshake"), short("Seq"),
		{0},
		{0x81},
		short("Version"),
		{1},
		{0x82},
		short("Command"), short("join"), short("Seq"),
		{1},
		{0x82},
		short("Existing"),
		{0x91},
		short(address), short("Replay"),
		{0xc2},
	}, nil)
	if _, err := c.Write(request); err != nil {
		return err
	}
	var got []byte
	buf := make([]byte, 1024)
	for !bytes.Contains(got, short("Num")) { // how many were joined: the end of the answer
		n, err := c.Read(buf)
		if err != nil {
			return fmt.Errorf("answer to join: %q: %w", got, err)
		}
		got = append(got, buf[:n]...)
	}
	if good := append(short("Error"), short("")...); bytes.Count(got, good) != 2 {
		return fmt.Errorf("join %s: %q", address, got)
	}
	return nil
}
