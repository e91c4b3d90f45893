package certs

import (
	"crypto/tls"
	"errors"
	"testing"

	"culvert/internal/testpki"
)

// The protocols of these tests, each for others.
const (
	anywhere = "anywhere" // servers
	within   = "within"   // servers of the own datacenter
	http2    = "h2"       // servers and gateways
)

var errNoProtocol = errors.New("no protocol")

func byProtocol(protocol string) (Admission, error) {
	switch protocol {
	case anywhere:
		return Admission{Roles: []Role{RoleServer}}, nil
	case within:
		return Admission{Roles: []Role{RoleServer}, SameDatacenter: true}, nil
	case http2:
		return Admission{Roles: []Role{RoleServer, RoleGateway}}, nil
	}
	return Admission{}, errNoProtocol
}

// offering is a client that offers some protocols.
func offering(c *tls.Config, protos ...string) *tls.Config {
	c = c.Clone()
	c.NextProtos = protos
	return c
}

func TestAdmissionByProtocol(t *testing.T) {
	ca := testpki.New(t, "consul")
	src, _ := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	config := src.ServerConfig([]string{within, anywhere, http2}, byProtocol)
	const gatewayNames = "names gw1.gateway.dc1.consul, gateway.dc1.consul, localhost"
	role := func(wanted, found string) *PeerError { return &PeerError{ReasonRole, wanted, found} }
	for _, c := range []struct {
		who      testpki.Option
		protocol string
		want     *PeerError
	}{
		{testpki.Server("dc1", "amy"), anywhere, nil},
		{testpki.Server("dc1", "amy"), within, nil},
		{testpki.Server("DC1", "amy"), within, nil},
		{testpki.Server("dc1", "amy"), http2, nil},
		{bob(), anywhere, nil},
		{bob(), within, &PeerError{ReasonDatacenter, "datacenter dc1", "datacenter dc2, " + bobNames}},
		{bob(), http2, nil},
		{testpki.Gateway("dc1", "gw1"), anywhere, role("role server", "role gateway, "+gatewayNames)},
		{testpki.Gateway("dc1", "gw1"), within, role("role server", "role gateway, "+gatewayNames)},
		{testpki.Gateway("dc1", "gw1"), http2, nil},
		{testpki.Client("dc1"), http2, role("role server or gateway", "role client, names client.dc1.consul, localhost")},
	} {
		cert := ca.Leaf(t, c.who)
		server, client := handshake(config, offering(rawClient(cert), c.protocol))
		if server.state.NegotiatedProtocol != c.protocol && c.want == nil {
			t.Errorf("negotiated %q, want %q", server.state.NegotiatedProtocol, c.protocol)
		}
		switch {
		case c.want != nil:
			checkRefusal(t, server.err, *c.want)
			if client.err == nil {
				t.Errorf("%s: the client got a byte", c.protocol)
			}
		case server.err != nil || client.err != nil:
			t.Errorf("%v, %s: %v, %v", cert.Leaf.DNSNames, c.protocol, server.err, client.err)
		}
	}
}

// crypto/tls negotiates nothing with a client that offers nothing, and with an
// http/1.1 client where there is h2. What is admitted without a protocol is for
// the caller to say, and its error is the handshake's.
func TestNoProtocol(t *testing.T) {
	ca := testpki.New(t, "consul")
	src, _ := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
	config := src.ServerConfig([]string{anywhere, http2}, byProtocol)
	for _, protos := range [][]string{nil, {"http/1.1"}, {"http/1.1", "http/1.0"}} {
		server, client := handshake(config, offering(rawClient(ca.Leaf(t, bob())), protos...))
		if !errors.Is(server.err, errNoProtocol) || client.err == nil {
			t.Errorf("offer %q: %v, %v", protos, server.err, client.err)
		}
	}
	// Who it is comes first: a stranger is told apart from a peer's mistake.
	server, _ := handshake(config, offering(rawClient(nil), "http/1.1"))
	if e, ok := errors.AsType[*PeerError](server.err); !ok || e.Reason != ReasonNoCertificate {
		t.Errorf("without a certificate: %v", server.err)
	}
}

// A ticket from one protocol opens no other: the holder of one that resumes is
// admitted, or not, by what it negotiates now.
func TestResumedSessionIsAdmittedByItsProtocol(t *testing.T) {
	for _, c := range []struct {
		name, first, then string
		who               testpki.Option
		reason            string
	}{
		{"a gateway that did HTTP", http2, anywhere, testpki.Gateway("dc1", "gw1"), ReasonRole},
		{"a gateway that did HTTP, for raft", http2, within, testpki.Gateway("dc1", "gw1"), ReasonRole},
		{"a server of dc2", anywhere, within, bob(), ReasonDatacenter},
		{"a server of dc2 that did HTTP", http2, within, bob(), ReasonDatacenter},
	} {
		t.Run(c.name, func(t *testing.T) {
			ca := testpki.New(t, "consul")
			src, _ := load(t, ca, ca.Leaf(t, testpki.Server("dc1", "alice")))
			config := src.ServerConfig([]string{within, anywhere, http2}, byProtocol)
			peer, _ := load(t, ca, ca.Leaf(t, c.who))
			client := peer.ClientConfig(aliceName, nil)
			for i := range 2 {
				server, _ := handshake(config, offering(client, c.first))
				if server.err != nil || server.state.DidResume != (i > 0) {
					t.Fatalf("connection %d: %v, resumed %t", i, server.err, server.state.DidResume)
				}
			}
			server, end := handshake(config, offering(client, c.then))
			if !server.state.DidResume {
				t.Fatal("the session was not resumed: this test shows nothing")
			}
			if e, ok := errors.AsType[*PeerError](server.err); !ok || e.Reason != c.reason {
				t.Errorf("got %v, want reason %s", server.err, c.reason)
			}
			if end.err == nil {
				t.Error("the client got a byte")
			}
		})
	}
}
