package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// A Type is the first byte of a connection that tells by it what it is, such as
// those of Consul's RPC port, or [Untyped].
type Type int

// Untyped is for connections of services without types, and for those that have
// not said yet what they are.
const Untyped Type = -1

// Byte is the type as it is on the wire. Of [Untyped] it is of no use.
func (t Type) Byte() byte { return byte(t) } //nolint:gosec // made of a byte

// TypeTimeout is how long a connection may take to say what it is.
const TypeTimeout = 2 * time.Second

// ErrNoType is for a connection that has not said in time what it is.
var ErrNoType = fmt.Errorf("no type byte within %v", TypeTimeout)

// TypeRules are what the types of an inbound service mean to whom it is for.
type TypeRules struct {
	// SameDatacenter are the types that peers of the own datacenter alone may
	// use.
	SameDatacenter []Type
	// TLS are the types behind which TLS of the two servers begins, so that
	// nothing can be told of what is inside, nor TLS put around it.
	TLS []Type
	// TLSFor is the type by which the local server is told that TLS begins,
	// where it demands that.
	TLSFor Type
	// Secure begins TLS with the local server, behind TLSFor. Nil where the
	// server wants none. The connection should have CloseWrite and Abort
	// methods, and where there is an error it is closed.
	Secure func(ctx context.Context, server *net.TCPConn) (net.Conn, error)
}

// readType takes the first byte of a connection.
func readType(ctx context.Context, c net.Conn) (Type, error) {
	var first [1]byte
	err := withinTypeTimeout(ctx, c, func() error {
		_, err := io.ReadFull(c, first[:])
		return err
	})
	return Type(first[0]), err
}

// peekType waits for the first byte of a connection and leaves it there.
func peekType(ctx context.Context, c *net.TCPConn) (Type, error) {
	var first byte
	err := withinTypeTimeout(ctx, c, func() (err error) {
		first, err = peek(c)
		return err
	})
	return Type(first), err
}

// withinTypeTimeout calls read and bounds what it reads in time.
func withinTypeTimeout(ctx context.Context, c net.Conn, read func() error) error {
	if err := c.SetReadDeadline(time.Now().Add(TypeTimeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) }) // closed already otherwise
	err := read()
	switch stopped := stop(); {
	case !stopped:
		return context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ErrNoType
	case err != nil:
		return err
	}
	return c.SetReadDeadline(time.Time{})
}
