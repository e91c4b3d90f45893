package locator

import (
	"context"
	"net"
	"testing"

	"culvert/catalog"
)

// nowhere connects at once, so that what is measured is the choice.
func nowhere(context.Context, string, string) (net.Conn, error) { return idle, nil }

var idle net.Conn = &conn{remote: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 8443}}

// BenchmarkDial is what finding a way costs beside the connecting itself.
func BenchmarkDial(b *testing.B) {
	for name, to := range map[string]catalog.Key{
		"direct": key("dc1", "amy"), "local": key("dc2", "bob"), "remote": key("dc3", "carl"), "auto": key("dc6", "fay"),
	} {
		b.Run(name, func(b *testing.B) {
			s := sites()
			s.Datacenters = append(s.Datacenters, catalog.Datacenter{
				Name: "dc6", Mode: catalog.ModeAuto, Replicated: []string{far1, far2}, Fallback: []string{primary1},
			})
			l, err := New(catalog.New(s), Options{Dial: nowhere})
			if err != nil {
				b.Fatal(err)
			}
			defer l.own.Close()
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := l.Dial(b.Context(), to); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
