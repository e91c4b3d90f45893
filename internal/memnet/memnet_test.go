package memnet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		a, b := Pipe()
		return a, b, func() { _ = a.Close(); _ = b.Close() }, nil
	})
}

func TestHalfCloseAndReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe()
		_, _ = io.WriteString(a, "question")
		_ = a.CloseWrite()
		if got, err := io.ReadAll(b); err != nil || string(got) != "question" {
			t.Errorf("read %q, %v", got, err)
		}
		_, _ = io.WriteString(b, "answer")
		if got := make([]byte, 6); true {
			if _, err := io.ReadFull(a, got); err != nil || string(got) != "answer" {
				t.Errorf("after the half-close: %q, %v", got, err)
			}
		}
		go b.Abort()
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after Abort: %v", err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write at the side that aborted: %v", err)
		}
	})
}

func TestBlockAndDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe()
		a.Block()
		_ = a.SetWriteDeadline(time.Now().Add(time.Second))
		began := time.Now()
		if _, err := a.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("write while blocked: %v after %v", err, time.Since(began))
		}
		_ = a.SetWriteDeadline(time.Time{})
		time.AfterFunc(time.Second, a.Unblock)
		if _, err := a.Write([]byte("y")); err != nil {
			t.Errorf("write after Unblock: %v", err)
		}
		// What the other side does not read holds the writer back.
		_ = a.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := a.Write(make([]byte, 2*BufferSize))
		if !errors.Is(err, os.ErrDeadlineExceeded) || n != BufferSize-1 {
			t.Errorf("wrote %d bytes into a full buffer, %v", n, err)
		}
		_ = b.Close()
	})
}

func TestListener(t *testing.T) {
	l := Listen()
	c, err := l.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "x")
	if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	_ = l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after Close: %v", err)
	}
	if _, err := l.Dial(context.Background()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial after Close: %v", err)
	}
}
