// Package federation is how datacenters find each other: one record each of their
// servers and gateways, kept by the sidecars of the primary datacenter, registered
// by their owners and followed by everybody.
//
//	registrar := federation.NewRegistrar(federation.RegistrarOptions{Registry: client, Source: replica, Entry: entry})
//	replica := federation.NewReplica(federation.ReplicaOptions{Client: client, Folder: folder})
//	...
//	view, err := reader.View(replica.State()) // what this process takes of it
//
// A [Client] asks the primary, a [Replica] follows it and keeps what it was told
// on disk, a [Registrar] keeps the own entry there, and a [Reader] decides what a
// record may do here. In the primary [NewAPI] serves all that over a store; the
// store itself is package store, and what is in it package state.
//
// How the primary is reached, and what is done with a view, is not its business:
// sidecar and gateway wire both. Each type says for how many goroutines it is.
package federation
