package resolve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

const (
	// udpSize is what is offered for an answer over UDP, in bytes: what fits any
	// path (DNS flag day 2020).
	udpSize = 1232
	// otherWait is how long the addresses of one kind wait for those of the
	// other: there are name servers that never answer for AAAA.
	otherWait = 500 * time.Millisecond
)

// A reply is an answer that may lack one kind of address because asking for
// that kind failed.
type reply struct {
	Answer
	no4, no6 bool
}

// question asks the name servers for a host or a service, in the order of
// resolv.conf's search list.
func (r *Resolver) question(ctx context.Context, q query) (reply, error) {
	ask := r.both
	if q.service {
		ask = r.targets
	}
	config, err := r.servers.load()
	if err != nil {
		return reply{}, fmt.Errorf("read %s: %w", r.servers.path, err)
	}
	for _, name := range config.NameList(q.name) {
		var found reply
		found, err = ask(ctx, config, name)
		// Servers that failed say nothing about the name: to go on to the next
		// one of the search list could find another host.
		if !errors.Is(err, errNoAddress) && !errors.Is(err, errNoService) {
			return found, err
		}
	}
	return reply{}, err
}

// A part is what asking for one kind of address ended with.
type part struct {
	addrs []netip.Addr
	ttl   time.Duration
	err   error
}

// failed tells a part that is not known from one that is empty.
func (p part) failed() bool { return p.err != nil && !errors.Is(p.err, errNoAddress) }

// both asks for A and AAAA at the same time.
func (r *Resolver) both(ctx context.Context, config *dns.ClientConfig, name string) (reply, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	types := [...]uint16{dns.TypeA, dns.TypeAAAA}
	var parts [len(types)]part
	done := make(chan int)
	for i, t := range types {
		go func() {
			p := &parts[i]
			answer, err := r.one(ctx, config, name, t)
			if p.err = err; err == nil {
				p.addrs, p.ttl, p.err = addresses(answer, t)
			}
			done <- i
		}()
	}
	other := time.NewTimer(questionTimeout)
	defer other.Stop()
	for left := len(types); left > 0; {
		select {
		case i := <-done:
			left--
			if parts[i].err == nil {
				other.Reset(otherWait)
			}
		case <-other.C:
			cancel()
		}
	}
	return merge(parts[0], parts[1])
}

func merge(v4, v6 part) (reply, error) {
	found := reply{no4: v4.failed(), no6: v6.failed()}
	ttl := MaxTTL
	for _, p := range []part{v4, v6} {
		if p.err == nil {
			found.Addrs = append(found.Addrs, p.addrs...)
			ttl = min(ttl, p.ttl)
		}
	}
	switch {
	case len(found.Addrs) > 0:
	case found.no4:
		return reply{}, v4.err
	default:
		return reply{}, v6.err
	}
	if found.no4 || found.no6 {
		ttl = MinTTL // the other kind may be had in a moment
	}
	found.Expires = time.Now().Add(max(ttl, MinTTL))
	return found, nil
}

// one asks the servers in turn for one type of record.
func (r *Resolver) one(ctx context.Context, config *dns.ClientConfig, name string, t uint16) (*dns.Msg, error) {
	timeout := r.timeout
	if timeout <= 0 {
		timeout = min(time.Duration(config.Timeout)*time.Second, maxTimeout)
	}
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), t)
	m.SetEdns0(udpSize, false)
	var last error
	for range max(config.Attempts, 1) {
		for _, server := range config.Servers {
			answer, err := r.exchange(ctx, m, net.JoinHostPort(server, config.Port), timeout)
			if err == nil {
				err = refusal(answer)
			}
			if err == nil {
				return answer, nil
			}
			last = fmt.Errorf("ask %s: %w", server, err)
			if ctx.Err() != nil {
				return nil, last
			}
		}
	}
	return nil, last
}

// refusal is the error of a server that does not know, as opposed to one that
// knows that there is nothing.
func refusal(m *dns.Msg) error {
	if m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError {
		return nil
	}
	return fmt.Errorf("it answered %s", dns.RcodeToString[m.Rcode])
}

// overNetwork asks one server over UDP, and over TCP if the answer was cut.
func overNetwork(ctx context.Context, m *dns.Msg, server string, timeout time.Duration) (*dns.Msg, error) {
	client := dns.Client{Timeout: timeout, UDPSize: udpSize}
	answer, err := exchange(ctx, &client, m, server)
	if err == nil && answer.Truncated {
		client.Net = "tcp"
		answer, err = exchange(ctx, &client, m, server)
	}
	return answer, err
}

// exchange is the client's ExchangeContext, which heeds a context's deadline and
// not that it was cancelled.
func exchange(ctx context.Context, client *dns.Client, m *dns.Msg, server string) (*dns.Msg, error) {
	conn, err := client.DialContext(ctx, server)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	answer, _, err := client.ExchangeWithConnContext(ctx, m, conn)
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return answer, err
}

// addresses takes the addresses out of an answer. The name servers asked follow
// aliases themselves; an alias that lives shorter than what it leads to decides.
func addresses(answer *dns.Msg, t uint16) ([]netip.Addr, time.Duration, error) {
	var addrs []netip.Addr
	ttl := MaxTTL
	for _, rr := range answer.Answer {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		case *dns.CNAME:
		default:
			continue
		}
		ttl = min(ttl, time.Duration(rr.Header().Ttl)*time.Second)
		if a, ok := netip.AddrFromSlice(ip); ok && rr.Header().Rrtype == t {
			addrs = append(addrs, a.Unmap())
		}
	}
	if len(addrs) == 0 {
		return nil, 0, errNoAddress
	}
	return addrs, ttl, nil
}
