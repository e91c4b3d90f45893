// Package h2 speaks HTTP/2 on TLS connections that somebody else has accepted or
// dialled, one by one, with net/http's own server and client.
//
//	s := h2.NewServer(handler, h2.ServerOptions{Log: log})
//	s.ServeConn(ctx, conn) // until the connection, or ctx, has ended
//
//	client := http.Client{Transport: h2.NewTransport(dial, h2.TransportOptions{})}
//	resp, err := client.Get("https://server.dc1.consul/v1/federation-states")
//
// The connections have had their handshake, and h2 was negotiated in it: what has
// negotiated anything else is closed. Both sides send a ping where nothing
// arrives, and close a connection on which it is not answered: what passes
// through relays does not end where the far end does.
//
// A [Server] and a transport may be used by any number of goroutines. Requests
// are not bounded in time, as they may be made to wait: handlers and callers
// bound their own.
package h2

import (
	"net/http"
	"time"
)

// The limits of both sides, unless options say otherwise.
const (
	// PingAfter is the silence after which a ping is sent, and PingTimeout how
	// long its answer may take.
	PingAfter   = 15 * time.Second
	PingTimeout = 10 * time.Second
	// WriteTimeout is how long a write may make no progress.
	WriteTimeout = 10 * time.Second
	// MaxHeaderBytes bounds the headers of a request and of a response.
	MaxHeaderBytes = 32 << 10
)

// headerTable is the size of the table of headers that were sent before, in
// bytes: room for none. Few requests go over one connection, and both ends would
// keep 4 KiB for each direction. It bounds what is sent, not what is taken: a
// client may use the usual table before it has heard of a smaller one.
const headerTable = 1

// protocol is what must have been negotiated.
const protocol = "h2"

// only returns HTTP/2 alone: net/http adds HTTP/1 where it is not told.
func only() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP2(true)
	return p
}

func config() *http.HTTP2Config {
	return &http.HTTP2Config{
		SendPingTimeout: PingAfter, PingTimeout: PingTimeout, WriteByteTimeout: WriteTimeout,
		MaxEncoderHeaderTableSize: headerTable,
	}
}
