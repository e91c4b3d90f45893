// Package capture makes the local server's traffic to its peers pass through
// the sidecar. [Bind] does it by answering on the peers' own addresses: every
// peer has an advertised address that is the same in all datacenters, that
// address is made local to this host (all of 127.0.0.0/8 is, on Linux), and
// Bind listens there, once for each peer and service.
//
//	b, err := capture.NewBind(peers, capture.BindOptions{
//		Self: self, Server: server, Advertise: advertise, Hairpin: true,
//		Services: services, Handler: handler,
//	})
//	if err != nil { ... } // an address that is not local, a port in use
//	err = b.Run(ctx)
//
// What the server sends goes to the [Handler]. What arrives for the server is
// handed back in the other direction with [Bind.Deliver], from the socket on
// the sender's advertised address, so that the server sees its peer and not
// the sidecar; [Bind.DialServer] does the same for streams.
//
// Packets are taken from the server's address alone and streams from addresses
// of this host alone: an endpoint is no open relay, whatever its address.
//
// A Bind may be used from many goroutines at once. It owns its sockets and
// waits for every goroutine that it started before Run returns. It opens no
// connection to a peer and knows nothing of TLS.
package capture

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"culvert/catalog"
)

// A Service is one port of the server that peers reach.
type Service struct {
	// Name is the service's name, as in the configuration.
	Name string
	// Packet tells UDP (true) from TCP.
	Packet bool
	// Port is the port on every advertised address, the same in the whole
	// federation.
	Port uint16
	// Local is where the local server listens for this service.
	Local netip.AddrPort
}

func (s Service) network() string {
	if s.Packet {
		return "udp"
	}
	return "tcp"
}

// A Handler takes what the local server sends to its peers.
type Handler interface {
	// Packet is called for each datagram. It must not block, and payload is
	// its caller's again when it returns. With more, the same goroutine's next
	// call is for the same peer and service, and follows at once.
	Packet(to catalog.Key, service string, payload []byte, more bool)
	// Stream is called in a goroutine of its own for each connection and owns
	// c from then on. It returns when c is closed, at the latest soon after
	// ctx has ended.
	Stream(ctx context.Context, to catalog.Key, service string, c *net.TCPConn)
}

// An EndpointError tells which endpoint could not be opened, and what would
// help.
type EndpointError struct {
	Peer    catalog.Key    // whose endpoint it is
	Network string         // "udp" or "tcp"
	Address netip.AddrPort // where it should have listened
	Err     error          // what the system said
	Remedy  string         // what the operator can do; may be empty
}

func (e *EndpointError) Error() string {
	return fmt.Sprintf("listen on %s/%s for peer %s: %v", e.Address, e.Network, e.Peer, e.Err)
}

// Unwrap returns the system's error.
func (e *EndpointError) Unwrap() error { return e.Err }

// Hint returns the remedy.
func (e *EndpointError) Hint() string { return e.Remedy }
