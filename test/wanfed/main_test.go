// Package wanfed holds Culvert against the program that defined its native
// protocols. Consul's own code is the client of a running sidecar, through
// running gateways, and the server of one: its packages agent/consul/wanfed,
// agent/pool, agent/grpc-internal and tlsutil, at the version that go.mod names.
//
// What of Consul's server is not exported is written anew in [server], each part
// with the name and the file of what it imitates.
//
// Everything is on loopback: each datacenter has a part of 127.0.0.0/8, see
// [world]. The program under test is bin/culvert, which `make wanfed` builds
// before. Nothing of the module culvert is imported.
package wanfed
