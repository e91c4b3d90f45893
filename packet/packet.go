// Package packet carries gossip packets (UDP datagrams) over a stream: the frames, the link that sends to one
// peer, and the receiver that takes what a peer sends.
//
//	link := packet.NewLink(dial, packet.LinkOptions{Peer: bob, Service: "gossip-packet", Metrics: m})
//	go link.Run(ctx)
//	link.Send(datagram) // never blocks, copies
//
//	recv := packet.NewReceiver(packet.ReceiverOptions{Metrics: m})
//	err := recv.Serve(ctx, conn, alice, func(p []byte) error { return writeUDP(p) })
//
// The wire format is docs/wire.md. Packets may be lost, as on UDP, and now and then be doubled; they are never
// changed or cut. [Link], [Receiver] and [Metrics] are for any number of goroutines, [Reader] is for one. A link
// owns each connection that its dial function returned, Serve owns the one it was given; no goroutine outlives
// Run or Serve.
//
// The package does not choose a path to a peer, does no TLS, and does not know whether a peer exists: the
// composition root gives it a dial function and a deliver function that do.
package packet

import (
	"context"
	"net"
)

// Conn is a connection that carries frames, after its handshake. Whoever is given one closes it.
type Conn interface {
	net.Conn
	// CloseWrite tells the peer that nothing more comes; reading goes on.
	CloseWrite() error
	// Abort closes at once, so that the peer sees a reset; a graceful end is Close.
	Abort()
	// Coalesce tells Culvert's own protocol from a native one. With it, frames that wait share one Write and the
	// acceptor answers with an empty frame; without, each frame is one Write and nothing is sent back. A Write
	// of up to 16 KiB must become one TLS record.
	Coalesce() bool
}

// onDone runs f once ctx is done. The returned function, to be called once, takes that back or waits for f.
func onDone(ctx context.Context, f func()) (stop func()) {
	fired := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(fired)
		f()
	})
	return func() {
		if !cancel() {
			<-fired
		}
	}
}
