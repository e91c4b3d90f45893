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

// udpSize is what is offered for an answer over UDP, in bytes: what fits any
// path (DNS flag day 2020).
const udpSize = 1232

// question asks the name servers for a host, in the order of resolv.conf's
// search list.
func (r *Resolver) question(ctx context.Context, host string) (Answer, error) {
	config, err := r.servers.load()
	if err != nil {
		return Answer{}, fmt.Errorf("read %s: %w", r.servers.path, err)
	}
	var last error
	for _, name := range config.NameList(host) {
		answer, err := r.both(ctx, config, name)
		if err == nil {
			return answer, nil
		}
		// A server that failed says nothing about the name: the fault is told,
		// and not that the search list's other names do not exist.
		if last == nil || !errors.Is(err, errNoAddress) {
			last = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return Answer{}, last
}

// both asks for A and AAAA at the same time. One that fails takes the other's
// addresses for less long.
func (r *Resolver) both(ctx context.Context, config *dns.ClientConfig, name string) (Answer, error) {
	type part struct {
		addrs []netip.Addr
		ttl   time.Duration
		err   error
	}
	types := []uint16{dns.TypeA, dns.TypeAAAA}
	parts := make([]part, len(types))
	done := make(chan int, len(types))
	for i, t := range types {
		go func() {
			var p part
			p.addrs, p.ttl, p.err = r.one(ctx, config, name, t)
			parts[i] = p
			done <- i
		}()
	}
	for range types {
		<-done
	}
	answer := Answer{}
	ttl := MaxTTL
	var err error
	for _, p := range parts {
		switch {
		case p.err == nil:
			answer.Addrs = append(answer.Addrs, p.addrs...)
			ttl = min(ttl, p.ttl)
		case !errors.Is(p.err, errNoAddress):
			err, ttl = p.err, MinTTL
		}
	}
	if len(answer.Addrs) == 0 {
		if err == nil {
			err = errNoAddress
		}
		return Answer{}, err
	}
	answer.Expires = time.Now().Add(max(ttl, MinTTL))
	return answer, nil
}

// one asks the servers in turn for one type of record.
func (r *Resolver) one(ctx context.Context, config *dns.ClientConfig, name string, t uint16) ([]netip.Addr, time.Duration, error) {
	var last error
	for range max(config.Attempts, 1) {
		for _, server := range config.Servers {
			reply, err := r.exchange(ctx, net.JoinHostPort(server, config.Port), name, t)
			if err == nil {
				return addresses(reply, t)
			}
			last = err
			if ctx.Err() != nil {
				return nil, 0, last
			}
		}
	}
	return nil, 0, last
}

func (r *Resolver) exchange(ctx context.Context, server, name string, t uint16) (*dns.Msg, error) {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), t)
	m.SetEdns0(udpSize, false)
	client := dns.Client{Timeout: r.timeout, UDPSize: udpSize}
	reply, _, err := client.ExchangeContext(ctx, m, server)
	if err == nil && reply.Truncated {
		client.Net = "tcp"
		reply, _, err = client.ExchangeContext(ctx, m, server)
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", server, err)
	}
	if reply.Rcode != dns.RcodeSuccess && reply.Rcode != dns.RcodeNameError {
		return nil, fmt.Errorf("ask %s: it answered %s", server, dns.RcodeToString[reply.Rcode])
	}
	return reply, nil
}

// addresses takes the addresses out of a reply. The name servers asked follow
// aliases themselves; an alias that lives shorter than what it leads to decides.
func addresses(reply *dns.Msg, t uint16) ([]netip.Addr, time.Duration, error) {
	var addrs []netip.Addr
	ttl := MaxTTL
	for _, rr := range reply.Answer {
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
