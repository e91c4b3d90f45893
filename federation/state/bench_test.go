package state

import (
	"encoding/json"
	"fmt"
	"strconv"
	"testing"
)

// filled is a state of so many datacenters of ten servers each.
func filled(b *testing.B, datacenters int) *State {
	b.Helper()
	var records []json.RawMessage
	for d := range datacenters {
		r := Record{Datacenter: fmt.Sprintf("dc%d", d), Index: 1, UpdatedAt: start()}
		for i := range 10 {
			sv := *srv("", fmt.Sprintf("n%d", i), fmt.Sprintf("10.%d.%d.%d", d/250, d%250, i+1)).Server
			r.Servers = append(r.Servers, sv)
		}
		records = append(records, r.encode())
	}
	s, err := New().With("one", 1, records, true)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// changed is a state in which one server of a datacenter has another version.
func changed(b *testing.B, s *State, i int) *State {
	b.Helper()
	reg := srv("dc7", "n3", "10.0.7.4")
	reg.Server.Version = strconv.Itoa(i)
	next, err := s.Apply(s.Index()+1, Command{At: start(), Register: reg})
	if err != nil {
		b.Fatal(err)
	}
	return next
}

// What one change costs the store.
func BenchmarkRegister(b *testing.B) {
	for _, n := range []int{300, 3000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s := filled(b, n)
			for i := 0; b.Loop(); i++ {
				s = changed(b, s, i)
			}
		})
	}
}

// What one change costs a reader.
func BenchmarkWith(b *testing.B) {
	for _, n := range []int{300, 3000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			s := filled(b, n)
			next := changed(b, s, 1)
			changes, _ := next.Changes("one", 1)
			for b.Loop() {
				if _, err := s.With("one", next.Index(), changes, false); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
