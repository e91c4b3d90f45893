package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"culvert/test/scrape"
)

// tolerance is how far two counts of the same thing may be apart: the agents
// gossip on while the four processes are read one after the other.
const tolerance = 0.05

// helloBytes is what a connection may have carried that came to nothing: the first
// to start finds nobody behind the gateways yet, and has said hello to the nearer.
const helloBytes = 4 << 10

// A reading is what one of the four saw.
type reading struct {
	bytes       float64 // TLS bytes on its wire
	connections float64 // TLS connections carried
	failed      float64 // handshakes that came to nothing; sidecars only
	packetsOut  float64 // sidecars only
	packetsIn   float64
	streamsOut  float64
	streamsIn   float64
}

// agree reads the metrics of both sidecars and both gateways until they agree,
// and prints them.
func (d *demo) agree(ctx context.Context) error {
	var sidecars, gateways [2]reading
	err := eventually(ctx, 5*time.Second, func() error {
		for i, s := range d.sites {
			var err error
			if sidecars[i], err = d.readSidecar(ctx, s); err != nil {
				return err
			}
			if gateways[i], err = d.readGateway(ctx, s); err != nil {
				return err
			}
		}
		return compare(sidecars, gateways)
	})
	d.say("\n  %-16s %12s %12s %9s %9s %9s %9s", "", "TLS bytes", "connections", "packets>", "<packets", "streams>", "<streams")
	for i, s := range d.sites {
		r := sidecars[i]
		d.say("  %-16s %12.0f %12.0f %9.0f %9.0f %9.0f %9.0f", "sidecar "+s.node, r.bytes, r.connections, r.packetsOut, r.packetsIn, r.streamsOut, r.streamsIn)
		d.say("  %-16s %12.0f %12.0f", "gateway "+s.dc, gateways[i].bytes, gateways[i].connections)
	}
	if err != nil {
		return err
	}
	return d.authenticated(ctx)
}

func (d *demo) readSidecar(ctx context.Context, s *site) (reading, error) {
	m, err := scrape.Metrics(ctx, d.client, s.sidecarAdmin())
	if err != nil {
		return reading{}, err
	}
	return reading{
		bytes:       m.Sum("culvert_alpn_wire_bytes_total"),
		connections: m.Sum("culvert_alpn_handshakes_total", "result", "ok"),
		failed:      m.Sum("culvert_alpn_handshakes_total", "result", "failed"),
		packetsOut:  m.Sum("culvert_packet_frames_total", "direction", "out"),
		packetsIn:   m.Sum("culvert_packet_frames_total", "direction", "in"),
		streamsOut:  m.Sum("culvert_stream_connections_total", "direction", "out"),
		streamsIn:   m.Sum("culvert_stream_connections_total", "direction", "in"),
	}, nil
}

func (d *demo) readGateway(ctx context.Context, s *site) (reading, error) {
	m, err := scrape.Metrics(ctx, d.client, s.gatewayAdmin())
	if err != nil {
		return reading{}, err
	}
	return reading{
		bytes:       m.Sum("culvert_gateway_bytes_total"),
		connections: m.Sum("culvert_gateway_connections_total", "result", "ok"),
	}, nil
}

func compare(sidecars, gateways [2]reading) error {
	alice, bob := sidecars[0], sidecars[1]
	failed := alice.failed + bob.failed
	pairs := []struct {
		what  string
		a, b  float64
		allow float64 // beside the tolerance
	}{
		{"bytes of both sidecars", alice.bytes, bob.bytes, failed * helloBytes},
		{"bytes of alice's sidecar and gateway dc1", alice.bytes, gateways[0].bytes, alice.failed * helloBytes},
		{"bytes of bob's sidecar and gateway dc2", bob.bytes, gateways[1].bytes, bob.failed * helloBytes},
		{"connections of both sidecars", alice.connections, bob.connections, 0},
		{"connections of alice's sidecar and gateway dc1", alice.connections, gateways[0].connections, failed},
		{"connections of bob's sidecar and gateway dc2", bob.connections, gateways[1].connections, failed},
		{"packets from alice to bob", alice.packetsOut, bob.packetsIn, 0},
		{"packets from bob to alice", bob.packetsOut, alice.packetsIn, 0},
		{"streams from alice to bob", alice.streamsOut, bob.streamsIn, 0},
		{"streams from bob to alice", bob.streamsOut, alice.streamsIn, 0},
	}
	for _, p := range pairs {
		if math.Abs(p.a-p.b) > tolerance*math.Max(p.a, p.b)+p.allow {
			return fmt.Errorf("%s: %.0f and %.0f", p.what, p.a, p.b)
		}
	}
	for i, s := range sidecars {
		if s.bytes == 0 || s.packetsOut == 0 || s.packetsIn == 0 || s.streamsOut+s.streamsIn == 0 {
			return fmt.Errorf("sidecar %d carried %.0f bytes, %.0f and %.0f packets, %.0f streams: nothing may be 0",
				i+1, s.bytes, s.packetsOut, s.packetsIn, s.streamsOut+s.streamsIn)
		}
	}
	return nil
}

// authenticated prints who each sidecar verified, and with what.
func (d *demo) authenticated(ctx context.Context) error {
	d.say("")
	for i, s := range d.sites {
		other := d.sites[1-i]
		var st struct {
			Peers []struct {
				Datacenter, Node, State, Path, Gateway string
				TLS                                    string `json:"tls"`
				Authenticated                          string `json:"authenticated"`
			}
		}
		if err := scrape.Status(ctx, d.client, s.sidecarAdmin(), &st); err != nil {
			return err
		}
		if len(st.Peers) != 1 {
			return fmt.Errorf("%s's sidecar has %d peers, want 1", s.node, len(st.Peers))
		}
		p := st.Peers[0]
		want := other.node + ".server." + other.dc + ".consul"
		if p.TLS != "TLS 1.3" || p.Authenticated != want || p.State != "up" {
			return fmt.Errorf("%s's sidecar says of its peer: %s, %s, authenticated %q; want up, TLS 1.3, %q", s.node, p.State, p.TLS, p.Authenticated, want)
		}
		d.say("  %s's sidecar authenticated %s with %s, by way of gateway %s", s.node, p.Authenticated, p.TLS, p.Gateway)
	}
	return nil
}
