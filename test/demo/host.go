package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A host is a network namespace. A thread of this process holds it and does what
// is to be done inside; both end with close. A nil host is where this process is.
type host struct {
	path string // of the namespace, for ip(8)
	jobs chan func()
	quit chan struct{}
	gone chan struct{}
}

var errHostGone = errors.New("the host is gone")

func newHost() (*host, error) {
	h := &host{jobs: make(chan func()), quit: make(chan struct{}), gone: make(chan struct{})}
	begun := make(chan error, 1)
	go h.live(begun)
	if err := <-begun; err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return h, nil
}

// live is the host's thread. It lasts as long as the host does, because what it
// has started is killed when it ends (prctl(2), PR_SET_PDEATHSIG).
func (h *host) live(begun chan<- error) {
	defer close(h.gone)
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		begun <- err
		return
	}
	h.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	begun <- nil
	for {
		select {
		case job := <-h.jobs:
			job()
		case <-h.quit:
			return
		}
	}
}

// do runs f inside. Sockets that it opens and processes that it starts stay there.
func (h *host) do(f func() error) error {
	if h == nil {
		return f()
	}
	done := make(chan error, 1)
	select {
	case h.jobs <- func() { done <- f() }:
		return <-done
	case <-h.gone:
		return errHostGone
	}
}

func (h *host) close() {
	close(h.quit)
	<-h.gone
}

// dial connects from the host.
func (h *host) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = h.do(func() error {
		c, err = (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// client asks from the host.
func (h *host) client() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: h.dial, DisableKeepAlives: true}}
}
