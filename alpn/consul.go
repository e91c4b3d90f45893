package alpn

// The bytes behind which a Consul server, or who dials one, begins TLS of its
// own: what they mean inside cannot be told from outside, and no protocol stands
// for them.
const (
	ConsulTLS         = 3
	ConsulTLSInsecure = 7 // without a certificate of the dialler
)

// ConsulSnapshot is the type of connections on which whole snapshots pass.
const ConsulSnapshot = 5

// A Type is one kind of connection of a service whose connections begin with a
// byte that tells their kind. A native server is told the kind by the protocol
// instead, and gets the connection without the byte.
type Type struct {
	Byte byte
	ALPN string
	// SameDatacenter takes it from servers of the own datacenter alone.
	SameDatacenter bool
}

// ConsulTypes returns the types of Consul's RPC port that have a protocol, as
// `pool.RPCType` and `pool.ALPN_RPC*` in Consul's agent/pool name them. Raft is a
// datacenter's own: a server of another one that got to it could take over.
func ConsulTypes() []Type {
	return []Type{
		{Byte: 0, ALPN: "consul/rpc-single"},
		{Byte: 1, ALPN: "consul/raft", SameDatacenter: true},
		{Byte: 4, ALPN: "consul/rpc-multi"},
		{Byte: ConsulSnapshot, ALPN: "consul/rpc-snapshot"},
		{Byte: 6, ALPN: "consul/rpc-gossip"},
		{Byte: 8, ALPN: "consul/rpc-grpc"},
		{Byte: 9, ALPN: "consul/raft-forwarding", SameDatacenter: true},
	}
}
