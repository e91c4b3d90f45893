package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	dialTimeout = 10 * time.Second
	// loadTimeout bounds one load, which takes a second or so.
	loadTimeout = 60 * time.Second
	// perSource is how many connections come from one address: proxies may have
	// limits on that.
	perSource = 250
)

// A client makes connections to a proxy, and says by way of open what they are:
// it writes what comes first, and first behind it.
type client func(ctx context.Context, from net.Addr, first []byte) (net.Conn, error)

// dial connects to a proxy, from an address of loopback's or from any.
func dial(ctx context.Context, from net.Addr, to string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout, LocalAddr: from}
	c, err := d.DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(loadTimeout))
}

// bulkConns is how many connections a bulk load has.
const bulkConns = 4

// bulk moves bytes, over one half of its connections to the local server, and over
// the others from it.
func bulk(ctx context.Context, open client, bytes int64) error {
	return inParallel(bulkConns, func(i int) error {
		letter := byte(askTake)
		if i%2 == 1 {
			letter = askGive
		}
		n := bytes / bulkConns
		c, err := open(ctx, nil, ask(letter, n))
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if letter == askGive {
			return take(c, n)
		}
		if err := give(c, n); err != nil {
			return err
		}
		return readByte(c)
	})
}

// short makes connections one after the other, some at a time: a byte each way,
// and the end.
func short(ctx context.Context, open client, conns, parallel int) error {
	var begun atomic.Int64
	return inParallel(parallel, func(int) error {
		for begun.Add(1) <= int64(conns) {
			if err := exchange(ctx, open); err != nil {
				return err
			}
		}
		return nil
	})
}

func exchange(ctx context.Context, open client) error {
	c, err := open(ctx, nil, append(ask(askEcho, 0), 1))
	if err != nil {
		return err
	}
	return errors.Join(readByte(c), c.Close())
}

// hold makes connections that are through to the local server, and leaves them
// open. The function closes them.
func hold(ctx context.Context, open client, conns int) (drop func(), err error) {
	held := make([]net.Conn, conns)
	drop = func() {
		for _, c := range held {
			if c != nil {
				_ = c.Close()
			}
		}
	}
	const parallel = 8
	err = inParallel(parallel, func(first int) error {
		for i := first; i < conns; i += parallel {
			from := &net.TCPAddr{IP: net.IPv4(127, 9, 0, byte(1+i/perSource))}
			c, err := open(ctx, from, append(ask(askEcho, 0), 1))
			if err != nil {
				return err
			}
			held[i] = c
			if err := errors.Join(readByte(c), c.SetDeadline(time.Time{})); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		drop()
		return nil, err
	}
	return drop, nil
}

func readByte(c net.Conn) error {
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return fmt.Errorf("wait for the local server's answer: %w", err)
	}
	return nil
}

// inParallel calls f with 0 to n-1 at the same time, and returns the first error.
func inParallel(n int, f func(i int) error) error {
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
