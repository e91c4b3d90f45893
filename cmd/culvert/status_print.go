package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"culvert/federation"
	"culvert/gateway"
	"culvert/sidecar"
)

func printSidecar(w io.Writer, s sidecar.Status) {
	_, _ = fmt.Fprintf(w, "sidecar %s/%s, version %s, %s\n\n", s.Datacenter, s.Node, s.Version, readiness(s.Ready))
	row(w, "PEER", "ADVERTISE", "ENDPOINT", "STATE", "PATH", "GATEWAY", "PACKETS OUT", "IN", "BYTES OUT", "IN", "STREAMS", "DROPS", "LAST ERROR")
	for _, p := range s.Peers {
		row(w, p.Datacenter+"/"+p.Node, p.Advertise, orDash(p.Endpoint), stateOf(p), p.Path, orDash(p.Gateway), p.PacketsSent, p.PacketsReceived,
			p.BytesSent, p.BytesReceived, fmt.Sprintf("%d/%d", p.StreamsOpen, p.StreamsTotal), drops(p.Drops), orDash(p.LastError))
	}
	printLost(w, s.Capture)
	if f := s.Federation; f != nil {
		printFederation(w, f)
	}
	if len(s.Gateways) == 0 {
		return
	}
	row(w)
	row(w, "GATEWAY", "DATACENTER", "HEALTH", "LAST ERROR")
	for _, g := range s.Gateways {
		row(w, g.Address, g.Datacenter, health(g.Healthy), orDash(g.LastError))
	}
}

func stateOf(p sidecar.PeerStatus) string {
	if p.Critical {
		return p.State + ", critical"
	}
	return p.State
}

// printLost tells what redirect refuses, and what keeps it from working.
func printLost(w io.Writer, c sidecar.CaptureStatus) {
	if len(c.Lost) > 0 {
		row(w)
		row(w, "REFUSED", "ONCE OF")
		for _, l := range c.Lost {
			row(w, l.Address, orDash(l.Name))
		}
	}
	if c.Blocked != "" {
		row(w)
		_, _ = fmt.Fprintf(w, "blocked by this host's firewall: %s\n", c.Blocked)
	}
}

// printFederation prints how a process stands in its federation, and what keeps
// that from being as it should.
func printFederation(w io.Writer, f *federation.Status) {
	line := fmt.Sprintf("federation: %s of %s", f.Role, f.Primary)
	if f.Role == "primary" {
		line = "federation: primary"
	}
	if f.Store == "" {
		line += ", no store is known yet"
	} else {
		line += fmt.Sprintf(", store %s at %d", f.Store, f.Index)
	}
	if f.Left {
		line += ", has LEFT: start the process again to come back"
	}
	row(w)
	_, _ = fmt.Fprintln(w, line)
	for _, trouble := range []string{f.Waiting, f.LastError, f.LastRefusal} {
		if trouble != "" {
			_, _ = fmt.Fprintln(w, "  "+trouble)
		}
	}
	for _, k := range f.KeptOut {
		_, _ = fmt.Fprintf(w, "  kept out: %s\n", k)
	}
}

func printGateway(w io.Writer, g gateway.Status) {
	_, _ = fmt.Fprintf(w, "gateway %s/%s, version %s, %s\n\n", g.Datacenter, g.Node, g.Version, readiness(g.Ready))
	row(w, "SIDECAR", "DOMAIN", "ADDRESS", "HEALTH", "OPEN", "LAST ERROR")
	for _, s := range g.Sidecars {
		row(w, s.Node, s.Domain, s.Address, health(s.Healthy), s.Open, orDash(s.LastError))
	}
	if f := g.Federation; f != nil {
		printFederation(w, f)
	}
	if len(g.Gateways) == 0 {
		return
	}
	row(w)
	row(w, "GATEWAY", "DATACENTER", "HEALTH", "LAST ERROR")
	for _, o := range g.Gateways {
		row(w, o.Address, o.Datacenter, health(o.Healthy), orDash(o.LastError))
	}
}

func drops(d map[string]uint64) string {
	var parts []string
	for _, reason := range slices.Sorted(maps.Keys(d)) {
		if d[reason] > 0 {
			parts = append(parts, fmt.Sprintf("%s=%d", reason, d[reason]))
		}
	}
	return orDash(strings.Join(parts, ","))
}
