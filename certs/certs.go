// Package certs says who a peer is: it makes, loads, checks and rotates the
// certificates of sidecars and gateways, and turns the names in a verified
// certificate into an [Identity].
//
//	src, err := certs.Load(certs.Options{
//		CAFile: "consul-ca.pem", CertFile: "dc1-server-consul-alice.pem",
//		KeyFile: "dc1-server-consul-alice-key.pem", Domain: "consul",
//	})
//	if err != nil { ... }
//	servers := func(string) (certs.Admission, error) {
//		return certs.Admission{Roles: []certs.Role{certs.RoleServer}}, nil
//	}
//	inbound := tls.Server(conn, src.ServerConfig(protocols, servers))
//	outbound := tls.Client(conn, src.ClientConfig(certs.ServerName("bob", "dc2", "consul"), protocols))
//
// Three kinds of DNS name make up the scheme, each with or without a node in
// front:
//
//	[<node>.]server.<dc>.<domain>    a server, or the sidecar that stands for it
//	[<node>.]gateway.<dc>.<domain>   a gateway, as a client of the federation API
//	[<node>.]client.<dc>.<domain>    what `consul tls cert create -client` makes: known, never admitted
//
// Names are matched from the right: the domain, one label for the datacenter,
// the role; what is left is the node, one label or more. They are compared in
// lower case. A name outside the scheme, such as localhost, says nothing.
//
// Verification is the package's own, in tls.Config.VerifyConnection, for two
// reasons: it runs on a resumed session too, and it can say what was wanted and
// what was found ([PeerError]), where crypto/tls would only fail. There is no
// way to switch a check off. TLS 1.3 is the only version.
//
// All functions and methods may be called from any number of goroutines. A
// [Source] starts none and watches no file: its owner calls [Source.Reload].
package certs

// A Role is what a certificate's holder is.
type Role string

// The roles of the naming scheme.
const (
	RoleServer  Role = "server"
	RoleGateway Role = "gateway"
	RoleClient  Role = "client"
)

func roles() []Role { return []Role{RoleServer, RoleGateway, RoleClient} }
