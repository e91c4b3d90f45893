package lab

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// nft loads rules in a namespace.
func nft(t testing.TB, h *Host, rules string) {
	t.Helper()
	cmd := exec.Command("ip", "netns", "exec", h.NS, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft on %s: %v\n%s", h.Name, err, out)
	}
}

// A Guard counts what crosses the WAN link, and lets through TCP to and from
// port 8443 alone. (ARP is no matter of these hooks.)
type Guard struct{ n *Network }

// Guard puts a guard on the link. Of ICMPv6 it lets neighbour discovery pass,
// with the multicast reports that belong to it (RFC 4861 section 7.2.1), of
// which the kernel sends some by itself.
func (n *Network) Guard() *Guard {
	n.t.Helper()
	const rules = `table inet guard {
  counter passed {}
  counter dropped {}
  chain wan {
    tcp dport 8443 counter name passed accept
    tcp sport 8443 counter name passed accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, mld2-listener-report } accept
    counter name dropped drop
  }
  chain in { type filter hook input priority 0; iifname "wan0" jump wan; }
  chain out { type filter hook output priority 0; oifname "wan0" jump wan; }
  chain through {
    type filter hook forward priority 0
    iifname "wan0" counter name dropped drop
    oifname "wan0" counter name dropped drop
  }
}
`
	for _, s := range n.Sites {
		nft(n.t, s.Gateway, rules)
	}
	return &Guard{n}
}

// Counts returns how many packets passed and were dropped, at both ends together.
func (g *Guard) Counts() (passed, dropped int) {
	g.n.t.Helper()
	for _, s := range g.n.Sites {
		counts := counters(g.n.t, s.Gateway, "guard")
		passed += counts["passed"]
		dropped += counts["dropped"]
	}
	return passed, dropped
}

// counters reads the named counters of a table: their packets.
func counters(t testing.TB, h *Host, table string) map[string]int {
	t.Helper()
	out, err := h.Run("nft", "-j", "list", "counters", "table", "inet", table)
	if err != nil {
		t.Fatal(err)
	}
	var answer struct {
		Nftables []struct {
			Counter *struct {
				Name    string
				Packets int
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("counters: %v: %s", err, out)
	}
	counts := make(map[string]int)
	for _, e := range answer.Nftables {
		if e.Counter != nil {
			counts[e.Counter.Name] = e.Counter.Packets
		}
	}
	return counts
}

// NFT runs a command of nft(8) on the host.
func (h *Host) NFT(rules string) {
	h.t.Helper()
	nft(h.t, h, rules)
}

// Ruleset is the host's whole set of rules, without the tables whose names begin
// with a prefix.
func (h *Host) Ruleset(without string) string {
	h.t.Helper()
	tables, err := h.Run("nft", "list", "tables")
	if err != nil {
		h.t.Fatal(err)
	}
	var all strings.Builder
	for line := range strings.Lines(tables) {
		f := strings.Fields(line) // table, family, name
		if strings.HasPrefix(f[2], without) {
			continue
		}
		out, err := h.Run("nft", "list", "table", f[1], f[2])
		if err != nil {
			h.t.Fatal(err)
		}
		all.WriteString(out)
	}
	return all.String()
}

// Cut takes the WAN link down, and Mend brings it up again.
func (n *Network) Cut() { n.t.Helper(); ip(n.t, n.Sites[0].Gateway.NS, "link set wan0 down") }

// Mend ends what Cut began.
func (n *Network) Mend() { n.t.Helper(); ip(n.t, n.Sites[0].Gateway.NS, "link set wan0 up") }

// Swallow makes the WAN link drop everything both ways in silence: packets are
// sent, and do not arrive.
func (n *Network) Swallow() {
	n.t.Helper()
	const rules = `table netdev fault { chain in { type filter hook ingress device "wan0" priority 0; drop; }; }
`
	for _, s := range n.Sites {
		nft(n.t, s.Gateway, rules)
	}
}

// Return ends what Swallow began.
func (n *Network) Return() {
	n.t.Helper()
	for _, s := range n.Sites {
		nft(n.t, s.Gateway, "delete table netdev fault\n")
	}
}

// String names the network in logs.
func (n *Network) String() string {
	return fmt.Sprintf("%d and %d hosts", len(n.Sites[0].Hosts), len(n.Sites[1].Hosts))
}
