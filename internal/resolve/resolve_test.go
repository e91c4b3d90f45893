package resolve

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// servers are name servers without a network. What answer says goes for all.
type servers struct {
	mu     sync.Mutex
	asked  []string // "server name type" each
	answer func(ctx context.Context, server, name string, t uint16) (*dns.Msg, error)
}

func (s *servers) exchange(ctx context.Context, m *dns.Msg, server string, timeout time.Duration) (*dns.Msg, error) {
	q := m.Question[0]
	s.mu.Lock()
	s.asked = append(s.asked, server+" "+q.Name+" "+dns.TypeToString[q.Qtype])
	answer := s.answer
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return answer(ctx, server, q.Name, q.Qtype)
}

func (s *servers) set(answer func(ctx context.Context, server, name string, t uint16) (*dns.Msg, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// took returns what was asked since the last call, in order.
func (s *servers) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	slices.Sort(asked)
	return asked
}

// records answers A and AAAA questions with the addresses of their kind, and
// says that there is nothing where there is none.
func records(ttl int, addrs ...string) func(context.Context, string, string, uint16) (*dns.Msg, error) {
	return func(_ context.Context, _, name string, t uint16) (*dns.Msg, error) {
		return message(name, t, ttl, addrs...), nil
	}
}

func message(name string, t uint16, ttl int, addrs ...string) *dns.Msg {
	m := new(dns.Msg)
	header := dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: uint32(ttl)}
	for _, s := range addrs {
		switch a := netip.MustParseAddr(s); {
		case a.Is4() && t == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: header, A: a.AsSlice()})
		case a.Is6() && t == dns.TypeAAAA:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: a.AsSlice()})
		}
	}
	return m
}

func silence(ctx context.Context, _, _ string, _ uint16) (*dns.Msg, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func nameError(context.Context, string, string, uint16) (*dns.Msg, error) {
	return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}}, nil
}

func after(d time.Duration, then func(context.Context, string, string, uint16) (*dns.Msg, error)) func(context.Context, string, string, uint16) (*dns.Msg, error) {
	return func(ctx context.Context, server, name string, t uint16) (*dns.Msg, error) {
		select {
		case <-time.After(d):
			return then(ctx, server, name, t)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// bubble runs f in a synctest bubble with a resolver that asks s.
func bubble(t *testing.T, hosts, resolvConf string, f func(t *testing.T, r *Resolver, s *servers)) {
	t.Helper()
	dir := t.TempDir()
	o := Options{HostsFile: filepath.Join(dir, "hosts"), ResolvConf: filepath.Join(dir, "resolv.conf")}
	write(t, o.HostsFile, hosts)
	write(t, o.ResolvConf, resolvConf)
	synctest.Test(t, func(t *testing.T) {
		r := New(o)
		defer r.Close()
		s := &servers{answer: nameError}
		r.exchange = s.exchange
		f(t, r, s)
	})
}

const oneServer = "nameserver 192.0.2.53\n"

func lookup(t *testing.T, r *Resolver, host string, want ...string) Answer {
	t.Helper()
	a, err := r.Lookup(t.Context(), host)
	if err != nil {
		t.Fatalf("Lookup(%s): %v", host, err)
	}
	var got []string
	for _, addr := range a.Addrs {
		got = append(got, addr.String())
	}
	if !slices.Equal(got, want) {
		t.Fatalf("Lookup(%s) = %v, want %v", host, got, want)
	}
	return a
}

func TestLiteralsNeverExpireAndAskNobody(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		for literal, want := range map[string]string{
			"192.0.2.1": "192.0.2.1", "2001:db8::1": "2001:db8::1", "::ffff:192.0.2.1": "192.0.2.1", "fe80::1%eth0": "fe80::1%eth0",
		} {
			if a := lookup(t, r, literal, want); !a.Expires.IsZero() {
				t.Errorf("%s expires at %v", literal, a.Expires)
			}
		}
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked %v", asked)
		}
	})
}

func TestHostsFileComesFirstAndIsReadAgain(t *testing.T) {
	hosts := "# comment\n192.0.2.1 Gateway gw.example # behind\n2001:db8::1\tgw.example\nnonsense gw.example\n192.0.2.9\n"
	bubble(t, hosts, oneServer, func(t *testing.T, r *Resolver, s *servers) {
		lookup(t, r, "gw.example", "192.0.2.1", "2001:db8::1")
		lookup(t, r, "GATEWAY.", "192.0.2.1")
		lookup(t, r, "localhost", "127.0.0.1", "::1")
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked %v", asked)
		}
		write(t, r.hosts.path, "192.0.2.22 gw.example\n")
		a := lookup(t, r, "gw.example", "192.0.2.1", "2001:db8::1") // looked at a moment ago
		time.Sleep(time.Until(a.Expires))
		lookup(t, r, "gw.example", "192.0.2.22")
		if err := os.Remove(r.hosts.path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		lookup(t, r, "gw.example", "192.0.2.22")
	})
}

func TestAnswersAreKeptForAsLongAsTheyAreValid(t *testing.T) {
	for _, c := range []struct {
		ttl  int
		kept time.Duration
	}{{0, MinTTL}, {30, 30 * time.Second}, {86400, MaxTTL}} {
		bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
			s.set(records(c.ttl, "192.0.2.1", "2001:db8::1"))
			a := lookup(t, r, "gw.example", "192.0.2.1", "2001:db8::1")
			if got := time.Until(a.Expires); got != c.kept {
				t.Errorf("ttl %d is kept for %v, want %v", c.ttl, got, c.kept)
			}
			s.set(records(c.ttl, "192.0.2.2"))
			time.Sleep(c.kept - time.Nanosecond)
			lookup(t, r, "gw.example", "192.0.2.1", "2001:db8::1")
			if got, want := s.took(), []string{"192.0.2.53:53 gw.example. A", "192.0.2.53:53 gw.example. AAAA"}; !slices.Equal(got, want) {
				t.Errorf("asked %v, want %v", got, want)
			}
			time.Sleep(time.Nanosecond)
			lookup(t, r, "gw.example", "192.0.2.2")
		})
	}
}

func TestTheShortestTTLOfAnAliasChainDecides(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(func(_ context.Context, _, name string, q uint16) (*dns.Msg, error) {
			m := message("lb.example.", q, 60, "192.0.2.1")
			alias := &dns.CNAME{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 5}, Target: "lb.example."}
			m.Answer = append([]dns.RR{alias}, m.Answer...)
			return m, nil
		})
		if a := lookup(t, r, "gw.example", "192.0.2.1"); time.Until(a.Expires) != 5*time.Second {
			t.Errorf("kept for %v", time.Until(a.Expires))
		}
	})
}

func TestOneQuestionForManyAskers(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(after(time.Second, records(30, "192.0.2.1")))
		impatient, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { // whoever began the question may go: it goes on
			if _, err := r.Lookup(impatient, "gw.example"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Lookup: %v", err)
			}
		})
		synctest.Wait()
		for range 50 {
			wg.Go(func() { lookup(t, r, "gw.example", "192.0.2.1") })
		}
		wg.Wait()
		if asked := s.took(); len(asked) != 2 {
			t.Errorf("asked %v", asked)
		}
	})
}

// The name servers go away for good: what was known serves on, and waiting for
// them costs next to nothing.
func TestSilentServersTakeNothingAway(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(5, "192.0.2.1"))
		lookup(t, r, "gw.example", "192.0.2.1")
		s.set(silence)
		time.Sleep(5 * time.Second)
		waited := time.Duration(0)
		for range 600 {
			began := time.Now()
			lookup(t, r, "gw.example", "192.0.2.1")
			waited += time.Since(began)
			time.Sleep(100 * time.Millisecond)
		}
		if waited > 2*time.Second {
			t.Errorf("a minute of lookups waited for %v", waited)
		}
		s.set(records(5, "192.0.2.2"))
		time.Sleep(questionTimeout + askEvery) // the last question in vain has ended by then
		lookup(t, r, "gw.example", "192.0.2.2")
	})
}

// An answer that comes too late for the Lookup that asked serves the next one.
func TestSlowServersAreHeardAtLast(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(5, "192.0.2.1"))
		lookup(t, r, "gw.example", "192.0.2.1")
		s.set(after(800*time.Millisecond, records(60, "192.0.2.2")))
		time.Sleep(5 * time.Second)
		began := time.Now()
		lookup(t, r, "gw.example", "192.0.2.1")
		if waited := time.Since(began); waited != staleWait {
			t.Errorf("waited for %v", waited)
		}
		lookup(t, r, "gw.example", "192.0.2.1") // and no more
		if waited := time.Since(began); waited != staleWait {
			t.Errorf("the second waited too: %v", waited)
		}
		time.Sleep(time.Second)
		lookup(t, r, "gw.example", "192.0.2.2")
	})
}

func TestNoAnswerIsWorseThanTheLastOne(t *testing.T) {
	for name, answer := range map[string]func(context.Context, string, string, uint16) (*dns.Msg, error){
		"no such name": nameError,
		"no address":   records(60),
		"refused": func(context.Context, string, string, uint16) (*dns.Msg, error) {
			return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeRefused}}, nil
		},
		"unreachable": func(context.Context, string, string, uint16) (*dns.Msg, error) { return nil, errors.New("unreachable") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
				s.set(answer)
				var none *NameError
				if _, err := r.Lookup(t.Context(), "gw.example"); !errors.As(err, &none) || none.Name != "gw.example" {
					t.Fatalf("Lookup of an unknown name: %v", err)
				}
				s.set(records(5, "192.0.2.1"))
				time.Sleep(askEvery)
				lookup(t, r, "gw.example", "192.0.2.1")
				s.set(answer)
				time.Sleep(5 * time.Second)
				s.took()
				lookup(t, r, "gw.example", "192.0.2.1")
				first := len(s.took())
				if first == 0 {
					t.Fatal("an answer that had expired was not asked for again")
				}
				time.Sleep(askEvery - time.Nanosecond)
				lookup(t, r, "gw.example", "192.0.2.1")
				if asked := s.took(); len(asked) > 0 {
					t.Errorf("asked again within a second: %v", asked)
				}
				s.set(records(5, "192.0.2.2"))
				time.Sleep(time.Nanosecond)
				lookup(t, r, "gw.example", "192.0.2.2")
			})
		})
	}
}

// One kind of address that cannot be asked for takes neither the other away nor
// what was known of it.
func TestOneKindOfAddressMayFail(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		only := func(kind uint16, addr string) func(context.Context, string, string, uint16) (*dns.Msg, error) {
			return func(ctx context.Context, server, name string, q uint16) (*dns.Msg, error) {
				if q != kind {
					return silence(ctx, server, name, q)
				}
				return message(name, q, 60, addr), nil
			}
		}
		s.set(only(dns.TypeA, "192.0.2.1"))
		began := time.Now()
		a := lookup(t, r, "gw.example", "192.0.2.1")
		if waited := time.Since(began); waited != otherWait {
			t.Errorf("waited for %v", waited)
		}
		if kept := time.Until(a.Expires); kept != MinTTL {
			t.Errorf("half an answer is kept for %v", kept)
		}
		s.set(only(dns.TypeAAAA, "2001:db8::1"))
		time.Sleep(MinTTL)
		lookup(t, r, "gw.example", "192.0.2.1") // while the other is waited for
		time.Sleep(otherWait)
		lookup(t, r, "gw.example", "2001:db8::1", "192.0.2.1")
		s.set(records(60, "2001:db8::2")) // now it is known that there is no other
		time.Sleep(MinTTL)
		lookup(t, r, "gw.example", "2001:db8::2")
	})
}

func TestForgetAsksAgainOnceASecond(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		r.Forget("never.asked")
		s.set(records(300, "192.0.2.1"))
		lookup(t, r, "gw.example", "192.0.2.1")
		s.set(records(300, "192.0.2.2"))
		s.took()
		for range 20 { // a Forget that comes too early is not lost
			r.Forget("gw.example")
			lookup(t, r, "gw.example", "192.0.2.1")
			time.Sleep(10 * time.Millisecond)
		}
		if asked := s.took(); len(asked) > 0 {
			t.Errorf("asked %v", asked)
		}
		time.Sleep(askEvery)
		lookup(t, r, "gw.example", "192.0.2.2")
		if asked := s.took(); len(asked) != 2 {
			t.Errorf("asked %v", asked)
		}
	})
}

func TestServersInTurnAndSearchList(t *testing.T) {
	conf := "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch one.example two.example\noptions timeout:1 attempts:2\n"
	bubble(t, "", conf, func(t *testing.T, r *Resolver, s *servers) {
		s.set(func(ctx context.Context, server, name string, q uint16) (*dns.Msg, error) {
			switch {
			case server == "192.0.2.53:53":
				return silence(ctx, server, name, q)
			case name == "gw.two.example." || name == "gw.dc2.test.":
				return message(name, q, 60, "192.0.2.1"), nil
			}
			return nameError(ctx, server, name, q)
		})
		began := time.Now()
		lookup(t, r, "gw", "192.0.2.1") // two names, a second for the silent server each
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("took %v", took)
		}
		s.took()
		lookup(t, r, "gw.dc2.test", "192.0.2.1")
		for _, q := range s.took() {
			if q != "192.0.2.53:53 gw.dc2.test. A" && q != "192.0.2.53:53 gw.dc2.test. AAAA" &&
				q != "192.0.2.54:53 gw.dc2.test. A" && q != "192.0.2.54:53 gw.dc2.test. AAAA" {
				t.Errorf("a name with a dot is tried as it is first, not as %s", q)
			}
		}
	})
}

// A server that cannot tell is not believed to have said that there is nothing.
func TestServerThatCannotTell(t *testing.T) {
	conf := "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch wild.example\n"
	for _, code := range []int{dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented} {
		bubble(t, "", conf, func(t *testing.T, r *Resolver, s *servers) {
			s.set(func(_ context.Context, server, name string, q uint16) (*dns.Msg, error) {
				if server == "192.0.2.53:53" {
					return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: code}}, nil
				}
				return message(name, q, 60, "192.0.2.1"), nil
			})
			lookup(t, r, "gw.dc2.example", "192.0.2.1")
			if asked := s.took(); len(asked) != 4 {
				t.Errorf("asked %v", asked)
			}
		})
	}
}

// Servers that are silent for the name as given must not lead to another host
// that a search list's wildcard has.
func TestSilenceDoesNotMoveOnInTheSearchList(t *testing.T) {
	conf := oneServer + "search wild.example\noptions attempts:1\n"
	bubble(t, "", conf, func(t *testing.T, r *Resolver, s *servers) {
		s.set(func(ctx context.Context, server, name string, q uint16) (*dns.Msg, error) {
			if name == "gw.dc2.example." {
				return silence(ctx, server, name, q)
			}
			return message(name, q, 60, "192.0.2.66"), nil
		})
		began := time.Now()
		a, err := r.Lookup(t.Context(), "gw.dc2.example")
		var timeout interface{ Timeout() bool }
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("Lookup = %v, %v: want a timeout", a, err)
		}
		if took := time.Since(began); took != maxTimeout {
			t.Errorf("took %v", took)
		}
	})
}

func TestResolvConfIsReadAgain(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(1, "192.0.2.1"))
		for _, c := range []struct{ content, server string }{
			{oneServer, "192.0.2.53:53"},
			{"nameserver 2001:db8::53\n", "[2001:db8::53]:53"},
			{"# being written\n", "[2001:db8::53]:53"},
			{"", "[2001:db8::53]:53"}, // gone
			{"nameserver 192.0.2.55\n", "192.0.2.55:53"},
		} {
			if c.content == "" {
				if err := os.Remove(r.servers.path); err != nil {
					t.Fatal(err)
				}
			} else {
				write(t, r.servers.path, c.content)
			}
			time.Sleep(2 * time.Second)
			lookup(t, r, "gw.example", "192.0.2.1")
			if asked, want := s.took(), c.server+" gw.example. A"; len(asked) != 2 || asked[0] != want {
				t.Errorf("with %q asked %v, want %s", c.content, asked, want)
			}
		}
	})
	bubble(t, "", "# none\n", func(t *testing.T, r *Resolver, _ *servers) {
		if a, err := r.Lookup(t.Context(), "gw.example"); err == nil {
			t.Errorf("Lookup without a name server = %v", a)
		}
	})
}

func TestCloseEndsQuestionsAndKeepsAnswers(t *testing.T) {
	bubble(t, "", oneServer, func(t *testing.T, r *Resolver, s *servers) {
		s.set(records(300, "192.0.2.1"))
		lookup(t, r, "gw.example", "192.0.2.1")
		s.set(silence)
		began := time.Now()
		ended := make(chan error)
		go func() {
			_, err := r.Lookup(context.Background(), "other.example")
			ended <- err
		}()
		synctest.Wait()
		r.Close()
		if err := <-ended; err == nil {
			t.Error("a question that was ended has an answer")
		}
		lookup(t, r, "gw.example", "192.0.2.1")
		if _, err := r.Lookup(t.Context(), "third.example"); !errors.Is(err, errClosed) {
			t.Errorf("Lookup after Close: %v", err)
		}
		r.Close()
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
	})
}
