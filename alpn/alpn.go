// Package alpn names the protocols that Culvert speaks inside TLS, terminates
// TLS for those that arrive, and offers them when it dials.
//
//	table, err := alpn.NewTable([]alpn.Service{
//		{Name: "gossip-packet", Kind: alpn.KindPacket, ALPN: "consul/wan-gossip/packet"},
//		{Name: "rpc", Kind: alpn.KindStream},
//	})
//	srv, err := alpn.NewServer(table, creds, alpn.ServerOptions{Packet: packets, Stream: streams})
//	srv.ServeConn(ctx, conn, establish) // from package mux; conn's first bytes are not consumed
//
//	d := alpn.NewDialer(table, creds, alpn.DialerOptions{})
//	c, err := d.Dial(ctx, raw, "bob.server.dc2.consul", "gossip-packet")
//
// A table may also have the protocols of the federation, [Raft] and [HTTP]; what
// dials one of these is [Dialer.DialProtocol]. Whom a protocol is taken from is
// its own matter, and is decided within the handshake: packets and streams are
// taken from servers, raft from servers of the own datacenter, HTTP from servers
// and gateways.
//
// A protocol without a route gets no_application_protocol before any handshake
// is made, and so does a client that names none: the empty protocol is never a
// handler. Both sides verify each other, in TLS 1.3; there is no option that
// turns this off.
//
// A [Table] is immutable; a [Server] and a [Dialer] may be used by any number of
// goroutines. Whoever is handed a connection owns it and closes it.
//
// The package knows neither where connections come from nor how they are
// reached, and reads nothing of what passes after the handshake.
package alpn

import (
	"crypto/tls"
	"time"

	"culvert/certs"
	"culvert/sniff"
)

// HandshakeTimeout and HelloTimeout are the budgets of the two phases before a
// connection is handed on, unless Options say otherwise.
const (
	HelloTimeout     = 10 * time.Second
	HandshakeTimeout = 10 * time.Second
)

// Credentials are this process's own certificate and its idea of whom to
// believe; [certs.Source] is one. The configurations must pick up a changed
// certificate by themselves, as a Server asks once, and disable dynamic record
// sizing: on native protocols one write is one record.
type Credentials interface {
	// ServerConfig verifies clients, which must be such as admit lets in for
	// the protocol that was negotiated.
	ServerConfig(protos []string, admit func(protocol string) (certs.Admission, error)) *tls.Config
	// ClientConfig verifies that the server carries the full name.
	ClientConfig(serverName string, protos []string) *tls.Config
	// PeerIdentity reads who a verified peer is.
	PeerIdentity(cs tls.ConnectionState) (certs.Identity, error)
}

// The reasons for which a [Server] refuses a connection, beside those of sniff
// and certs.
const (
	reasonNoALPN           = "no_alpn"
	reasonUnknownALPN      = "unknown_alpn"
	reasonHandshakeTimeout = "handshake_timeout"
	reasonHandshake        = "handshake"

	certPrefix = "cert_"
)

// Reasons lists every reason for which a [Server] refuses a connection: the
// closed set of values that ServerOptions.Refused is called with. Those that a
// certificate gave are the reasons of [certs.PeerError] behind "cert_".
func Reasons() []string {
	reasons := append(sniff.Reasons(), reasonNoALPN, reasonUnknownALPN, reasonHandshakeTimeout, reasonHandshake)
	for _, r := range certs.Reasons() {
		reasons = append(reasons, certPrefix+r)
	}
	return reasons
}
