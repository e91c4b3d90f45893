package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
)

// Where the random is in a ClientHello that is one record: behind the headers of
// record and message and the version (RFC 8446 section 4.1.2).
const (
	randomAt  = 5 + 4 + 2
	randomLen = 32
)

// A keeper is a connection that keeps what is written, and takes no more.
type keeper struct {
	net.Conn
	kept []byte
}

var errKept = errors.New("kept")

func (k *keeper) Write(b []byte) (int, error) {
	k.kept = append(k.kept, b...)
	return 0, errKept
}

// newHello returns a function that makes ClientHellos as crypto/tls sends them to
// the server behind gateways.
func newHello() (func() []byte, error) {
	near, far := net.Pipe()
	defer func() { _ = near.Close(); _ = far.Close() }()
	k := &keeper{Conn: near}
	err := tls.Client(k, &tls.Config{ServerName: opaqueName, NextProtos: []string{protocol}, MinVersion: tls.VersionTLS13}).Handshake()
	if !errors.Is(err, errKept) {
		return nil, fmt.Errorf("make a hello: %w", err)
	}
	return func() []byte {
		b := slices.Clone(k.kept)
		_, _ = rand.Read(b[randomAt : randomAt+randomLen]) // never fails
		return b
	}, nil
}

// opaque is a client whose connections begin with a hello and are no TLS
// otherwise.
func opaque(address string, hello func() []byte) client {
	return func(ctx context.Context, from net.Addr, first []byte) (net.Conn, error) {
		c, err := dial(ctx, from, address)
		if err != nil {
			return nil, err
		}
		if _, err := c.Write(append(hello(), first...)); err != nil {
			_ = c.Close()
			return nil, err
		}
		return c, nil
	}
}

// secure is a client whose connections are TLS.
func secure(address string, config *tls.Config) client {
	return func(ctx context.Context, from net.Addr, first []byte) (net.Conn, error) {
		c, err := dial(ctx, from, address)
		if err != nil {
			return nil, err
		}
		t := tls.Client(c, config)
		if err := t.HandshakeContext(ctx); err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("handshake: %w", err)
		}
		if _, err := t.Write(first); err != nil {
			_ = c.Close()
			return nil, err
		}
		return t, nil
	}
}
