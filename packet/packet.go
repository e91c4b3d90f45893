// Package packet carries gossip packets (UDP datagrams) over a stream: the frames, the link to one peer, and the
// receiver of what peers dial.
//
//	recv := packet.NewReceiver(packet.ReceiverOptions{Metrics: m})
//	deliver := func(p []byte) error { return writeUDP(p) }
//
//	link := packet.NewLink(dial, packet.LinkOptions{
//		Self: alice, Peer: bob, Service: "gossip-packet", Receiver: recv, Deliver: deliver, Pulse: pulse,
//	})
//	link.Start(ctx)
//	link.Send(datagram) // never blocks, copies
//
//	err := recv.Serve(ctx, conn, bob, link, deliver) // one that bob has dialled
//
// Between two of Culvert's acceptors a connection carries packets both ways, whoever dialled it, and is kept alive.
// To any other it carries them from the dialler to the acceptor.
//
// The wire format is docs/wire.md. Packets may be lost, as on UDP, and now and then be doubled or change places;
// they are never changed or cut. [Link], [Receiver], [Pulse] and [Metrics] are for any number of goroutines, [Reader]
// is for one. A link owns each connection that its dial function returned, Serve owns the one it was given; no
// goroutine outlives [Link.Stop] or Serve.
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
	// Write takes all it is given and does not wait for the peer: what the network does not take is Pending. A
	// Write of up to 16 KiB must become one TLS record.
	net.Conn
	// Pending says whether something that was written waits for the peer to make room.
	Pending() bool
	// Flush waits until nothing is pending, at most until the write deadline.
	Flush() error
	// CloseWrite tells the peer that nothing more comes, after what is pending; reading goes on.
	CloseWrite() error
	// Abort closes at once, so that the peer sees a reset; a graceful end is Close.
	Abort()
	// Coalesce tells Culvert's own protocol from a native one. With it, frames that wait share one Write and the
	// acceptor answers with an empty frame; without, each frame is one Write and nothing is sent back.
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
