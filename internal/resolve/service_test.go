package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

const service = "srv:_gw._tcp.example"

// zone answers SRV questions for _gw._tcp.example with records of the form
// "priority weight port target", and those for addresses with hosts'.
type zone struct {
	ttl     int
	records []string
	hosts   map[string][]string
}

func (z zone) message(name string, t uint16) *dns.Msg {
	if t != dns.TypeSRV {
		return message(name, t, z.ttl, z.hosts[name]...)
	}
	m := new(dns.Msg)
	for _, text := range z.records {
		rr, err := dns.NewRR(fmt.Sprintf("%s %d IN SRV %s", name, z.ttl, text))
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func (z zone) answer(_ context.Context, _, name string, t uint16) (*dns.Msg, error) {
	if t == dns.TypeSRV && name != "_gw._tcp.example." {
		return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}}, nil
	}
	return z.message(name, t), nil
}

func addresses4(t *testing.T, r *Resolver, endpoint string) []string {
	t.Helper()
	addrs, err := r.Addresses(t.Context(), endpoint)
	if err != nil {
		t.Fatalf("Addresses(%s): %v", endpoint, err)
	}
	return texts(addrs)
}

func texts(addrs []netip.AddrPort) (out []string) {
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return out
}

func wantAddresses(t *testing.T, r *Resolver, endpoint string, want ...string) {
	t.Helper()
	if got := addresses4(t, r, endpoint); !slices.Equal(got, want) {
		t.Fatalf("Addresses(%s) = %v, want %v", endpoint, got, want)
	}
}

func wantKnown(t *testing.T, r *Resolver, endpoint string, want ...string) {
	t.Helper()
	if got := texts(r.Known(endpoint)); !slices.Equal(got, want) {
		t.Errorf("Known(%s) = %v, want %v", endpoint, got, want)
	}
}

func TestAddressesOfAHost(t *testing.T) {
	bubble(t, "192.0.2.7 both both\n", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(60, "192.0.2.1", "2001:db8::1"))
		wantKnown(t, r, "gw.example:8443")
		wantAddresses(t, r, "gw.example:8443", "192.0.2.1:8443", "[2001:db8::1]:8443")
		wantKnown(t, r, "gw.example:8443", "192.0.2.1:8443", "[2001:db8::1]:8443")
		wantAddresses(t, r, "192.0.2.1:1", "192.0.2.1:1")
		wantKnown(t, r, "[::ffff:192.0.2.1]:1", "192.0.2.1:1")
		wantAddresses(t, r, "both:1", "192.0.2.7:1")
		addrs, err := r.Addresses(t.Context(), "gw.example:1")
		if err != nil {
			t.Fatal(err)
		}
		addrs[0] = netip.AddrPort{} // the caller's
		wantAddresses(t, r, "gw.example:1", "192.0.2.1:1", "[2001:db8::1]:1")
		if asked := s.took(); len(asked) != 2 {
			t.Errorf("asked %v", asked)
		}
		for _, endpoint := range []string{"gw.example", "gw.example:http", "gw.example:70000", "", "srv"} {
			if addrs, err := r.Addresses(t.Context(), endpoint); err == nil || r.Known(endpoint) != nil {
				t.Errorf("Addresses(%s) = %v", endpoint, addrs)
			}
		}
	})
}

// Priorities come first, and the targets' own addresses and ports are used.
func TestService(t *testing.T) {
	bubble(t, "192.0.2.30 gw3.example\n", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(zone{60, []string{"20 5 8445 gw3.example.", "10 0 8443 GW1.example.", "15 0 8444 gw2.example.", "16 0 0 gw1.example.", "17 0 8443 gw1.example."}, map[string][]string{
			"gw1.example.": {"192.0.2.1"}, "gw2.example.": {"2001:db8::2"},
		}}.answer)
		want := []string{"192.0.2.1:8443", "[2001:db8::2]:8444", "192.0.2.30:8445"}
		wantKnown(t, r, service)
		wantAddresses(t, r, service, want...)
		wantKnown(t, r, service, want...)
		wantAsked := []string{
			"192.0.2.53:53 _gw._tcp.example. SRV",
			"192.0.2.53:53 gw1.example. A", "192.0.2.53:53 gw1.example. AAAA",
			"192.0.2.53:53 gw2.example. A", "192.0.2.53:53 gw2.example. AAAA",
		}
		if asked := s.took(); !slices.Equal(asked, wantAsked) {
			t.Errorf("asked %v, want %v", asked, wantAsked)
		}
		for range 10 {
			wantAddresses(t, r, service, want...)
		}
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked again: %v", asked)
		}
		wantAddresses(t, r, "gw1.example.:1", "192.0.2.1:1") // one cache
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked again: %v", asked)
		}
	})
}

func TestWeights(t *testing.T) {
	first := make(map[string]int)
	second := 0
	in := []target{{"a", 8443, 1, 30}, {"b", 8443, 1, 10}, {"c", 8443, 1, 0}, {"d", 8443, 2, 0}, {"e", 8443, 2, 0}, {"f", 8443, 3, 1}}
	for range 4000 {
		out := inTurn(in)
		if len(out) != 6 || out[3].priority != 2 || out[4].priority != 2 || out[3] == out[4] || out[5].host != "f" {
			t.Fatalf("in turn %v", out)
		}
		first[out[0].host]++
		if out[3].host == "d" {
			second++
		}
		if out[0].host == "a" && out[1].host == "c" && out[2].host == "b" {
			first["c second"]++
		}
	}
	if first["a"] < 2850 || first["a"] > 3150 || first["c"] > 10 || first["c second"] > 10 {
		t.Errorf("the first ones are %v, want about 3000 a and hardly a c", first)
	}
	if second < 1800 || second > 2200 {
		t.Errorf("of two without weight one is first %d times of 4000", second)
	}
	if in[0].host != "a" || in[5].host != "f" {
		t.Error("the records themselves were changed")
	}
}

// Addresses of one target take turns, and so do targets of one priority.
func TestAddressesOfATargetAreShuffled(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(zone{60, []string{"1 1 1 gw.example.", "1 1 2 gw.example."}, map[string][]string{"gw.example.": {"192.0.2.1", "192.0.2.2"}}}.answer)
		first := make(map[string]int)
		for range 100 {
			first[addresses4(t, r, service)[0]]++
			wantKnown(t, r, "gw.example.:1", "192.0.2.1:1", "192.0.2.2:1") // what is kept is not shuffled
		}
		if len(first) != 4 {
			t.Errorf("the first ones are %v", first)
		}
	})
}

func TestNoService(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(context.Context, string, string, uint16) (*dns.Msg, error)
		want   error
	}{
		"no such name":    {nameError, errNoService},
		"nothing":         {zone{ttl: 60}.answer, errNoService},
		"it says so":      {zone{60, []string{"0 0 0 ."}, nil}.answer, errDeclined},
		"it says so, 2":   {zone{60, []string{"0 0 8443 ."}, nil}.answer, errDeclined},
		"no such targets": {zone{60, []string{"0 0 1 a.example.", "0 0 1 b.example."}, nil}.answer, errNoAddress},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, "", oneServer+"search wild.test\n", func(t *testing.T, r *Resolver, s *servers) {
				good := zone{5, []string{"1 1 8443 gw.example."}, map[string][]string{"gw.example.": {"192.0.2.1"}}}
				s.set(c.answer)
				if addrs, err := r.Addresses(t.Context(), service); !errors.Is(err, c.want) || !strings.Contains(err.Error(), "_gw._tcp.example") {
					t.Errorf("Addresses = %v, %v; want %v", addrs, err, c.want)
				}
				onward := slices.Contains(s.took(), "192.0.2.53:53 _gw._tcp.example.wild.test. SRV")
				if want := errors.Is(c.want, errNoService); onward != want {
					t.Errorf("the search list was followed: %v", onward)
				}
				time.Sleep(2 * time.Minute)
				s.set(good.answer)
				wantAddresses(t, r, service, "192.0.2.1:8443")
				s.set(c.answer) // what was known serves on, as with addresses
				if c.want != errNoAddress {
					time.Sleep(6 * time.Second)
					wantAddresses(t, r, service, "192.0.2.1:8443")
					wantKnown(t, r, service, "192.0.2.1:8443")
				}
			})
		})
	}
}

// The rules for addresses go for services: kept for as long as is said, last good
// answers serve on, and one question is under way at a time.
func TestServicesAreKeptAsNamesAre(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		old := zone{5, []string{"1 1 1 gw.example."}, map[string][]string{"gw.example.": {"192.0.2.1"}}}
		next := zone{5, []string{"1 1 2 gw.example."}, map[string][]string{"gw.example.": {"192.0.2.2"}}}
		s.set(after(time.Second, old.answer))
		ended := make(chan []netip.AddrPort)
		for range 50 {
			go func() {
				addrs, err := r.Addresses(t.Context(), service)
				if err != nil {
					t.Error(err)
				}
				ended <- addrs
			}()
		}
		for range 50 {
			if got := texts(<-ended); !slices.Equal(got, []string{"192.0.2.1:1"}) {
				t.Errorf("Addresses = %v", got)
			}
		}
		if asked := s.took(); len(asked) != 3 {
			t.Errorf("asked %v", asked)
		}
		s.set(next.answer)
		time.Sleep(5*time.Second - time.Second - time.Nanosecond)
		wantAddresses(t, r, service, "192.0.2.1:1")
		time.Sleep(time.Second + time.Nanosecond)
		wantAddresses(t, r, service, "192.0.2.2:2")
		s.set(silence)
		time.Sleep(5 * time.Second)
		waited := time.Duration(0)
		for range 600 {
			began := time.Now()
			wantAddresses(t, r, service, "192.0.2.2:2")
			waited += time.Since(began)
			time.Sleep(100 * time.Millisecond)
		}
		if waited > 4*time.Second { // for the service and for its target
			t.Errorf("a minute of look-ups waited for %v", waited)
		}
		s.set(old.answer)
		time.Sleep(questionTimeout + askEvery)
		wantAddresses(t, r, service, "192.0.2.1:1")
	})
}

func TestForgetAService(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		r.Forget(service)
		s.set(zone{300, []string{"1 1 1 a.example."}, map[string][]string{"a.example.": {"192.0.2.1"}}}.answer)
		wantAddresses(t, r, service, "192.0.2.1:1")
		s.set(zone{300, []string{"1 1 1 a.example."}, map[string][]string{"a.example.": {"192.0.2.2"}}}.answer)
		time.Sleep(2 * time.Second)
		wantAddresses(t, r, service, "192.0.2.1:1")
		r.Forget(service) // the target's addresses may have changed, or the service
		wantAddresses(t, r, service, "192.0.2.2:1")
		s.set(zone{300, []string{"1 1 2 b.example."}, map[string][]string{"b.example.": {"192.0.2.3"}}}.answer)
		time.Sleep(2 * time.Second)
		r.Forget(service)
		wantAddresses(t, r, service, "192.0.2.3:2")
		s.set(zone{300, nil, map[string][]string{"b.example.": {"192.0.2.4"}}}.answer)
		time.Sleep(2 * time.Second)
		r.Forget("b.example.:7")
		wantAddresses(t, r, "b.example.:7", "192.0.2.4:7")
	})
}

// A target whose name nobody answers for holds up no other for long, and is there
// the next time if it is answered late.
func TestSlowTarget(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		z := zone{60, []string{"1 1 1 slow.example.", "2 1 2 gw.example.", "3 1 3 none.example."}, map[string][]string{
			"gw.example.": {"192.0.2.1"}, "slow.example.": {"192.0.2.2"},
		}}
		s.set(func(ctx context.Context, server, name string, q uint16) (*dns.Msg, error) {
			if name == "slow.example." {
				return after(time.Second, z.answer)(ctx, server, name, q)
			}
			return z.answer(ctx, server, name, q)
		})
		began := time.Now()
		wantAddresses(t, r, service, "192.0.2.1:2")
		if took := time.Since(began); took != otherWait {
			t.Errorf("took %v", took)
		}
		time.Sleep(time.Second)
		wantAddresses(t, r, service, "192.0.2.2:1", "192.0.2.1:2")
		s.set(silence)
		time.Sleep(time.Minute) // known is known
		wantAddresses(t, r, service, "192.0.2.2:1", "192.0.2.1:2")
	})
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) { // none answers
		z := zone{60, []string{"1 1 1 none.example.", "2 1 1 slow.example.", "3 1 1 none.example."}, nil}
		s.set(func(ctx context.Context, server, name string, q uint16) (*dns.Msg, error) {
			if name == "slow.example." {
				return silence(ctx, server, name, q)
			}
			return z.answer(ctx, server, name, q)
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if addrs, err := r.Addresses(ctx, service); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Addresses = %v, %v: want that of the target that may come back", addrs, err)
		}
	})
}

// A service of very many targets costs a bounded number of questions.
func TestManyTargets(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		z := zone{ttl: 60, hosts: make(map[string][]string)}
		for i := range 200 {
			host := fmt.Sprintf("gw%d.example.", i)
			z.records = append(z.records, fmt.Sprintf("%d 0 1 %s", 200-i, host))
			z.hosts[host] = []string{fmt.Sprintf("192.0.2.%d", i)}
		}
		s.set(z.answer)
		got := addresses4(t, r, service)
		if len(got) != maxTargets || got[0] != "192.0.2.199:1" {
			t.Errorf("Addresses = %v", got)
		}
		if asked := s.took(); len(asked) != 1+2*maxTargets {
			t.Errorf("asked %d questions", len(asked))
		}
	})
}

// Names that nobody looks up any more are forgotten once there are many.
func TestManyNames(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(60, "192.0.2.1"))
		for i := range 3 * manyNames {
			lookup(t, r, fmt.Sprintf("gw%d.example", i), "192.0.2.1")
			lookup(t, r, "kept.example", "192.0.2.1")
			time.Sleep(unusedFor / manyNames)
		}
		synctest.Wait()
		if got := len(r.names); got > manyNames+2 {
			t.Errorf("%d names are kept", got)
		}
		if len(r.names) < manyNames-2 {
			t.Errorf("%d names are kept: too few", len(r.names))
		}
		s.set(silence)
		time.Sleep(time.Minute)
		lookup(t, r, "kept.example", "192.0.2.1")
	})
}
