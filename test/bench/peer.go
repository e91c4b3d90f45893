package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A peer is a figure of another program's, beside what it was where this project's
// aims were set. A run in which the peers do much better or worse tells nothing:
// they are tuned otherwise.
//
// Times depend on the machine. All of them are compared at once, allowing for one
// factor, by which the machine is slower or faster; memory is compared as it is.
type peer struct {
	topic, name  string
	value, known float64
	memory       bool
}

// within is how far a peer may be from what is known of it.
const within = 0.25

// peers returns those of a topic.
func (t *topic) peers() []peer {
	var out []peer
	for _, r := range t.rows {
		known, ok := t.known[r.name]
		if !ok || r.err != nil {
			continue
		}
		value, _, _ := r.median(0)
		out = append(out, peer{topic: t.name, name: r.name, value: value, known: known, memory: t.memory})
	}
	return out
}

// compare tells of each peer whether it is what is known of it.
func compare(peers []peer) string {
	if len(peers) == 0 {
		return ""
	}
	factor := slower(peers)
	var out strings.Builder
	fmt.Fprintf(&out, "\npeers beside the figures that they had where the aims were set; times are %.2f times those as a rule\n", factor)
	for _, p := range peers {
		by := factor
		if p.memory {
			by = 1
		}
		off := p.value/p.known/by - 1
		verdict := "counts"
		if math.Abs(off) > within {
			verdict = fmt.Sprintf("DOES NOT COUNT, more than %.0f %% off", within*100)
		}
		fmt.Fprintf(&out, "  %-20s %-8s %s beside %s", p.topic, p.name, figure(p.value), figure(p.known))
		if by != 1 {
			fmt.Fprintf(&out, " x %.2f", by)
		}
		fmt.Fprintf(&out, " (%+.0f %%): %s\n", off*100, verdict)
	}
	return out.String()
}

// slower is by how much the machine is slower than the one that the known times
// are of: the median over all of them; 1 where there are none.
func slower(peers []peer) float64 {
	var factors []float64
	for _, p := range peers {
		if !p.memory {
			factors = append(factors, p.value/p.known)
		}
	}
	if len(factors) == 0 {
		return 1
	}
	slices.Sort(factors)
	n := len(factors)
	return (factors[(n-1)/2] + factors[n/2]) / 2
}
