package alert

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/internal/testtcp"
)

// Bytes that nobody read must not turn the alert into a reset.
func TestRefuseWithUnreadBytes(t *testing.T) {
	c, s := testtcp.Pair(t)
	if _, err := c.Write(bytes.Repeat([]byte("x"), 4096)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); Refuse(s, UnrecognizedName) }()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("read alert: %v", err)
	}
	if want := []byte{0x15, 3, 3, 0, 2, 2, 112}; !bytes.Equal(got, want) {
		t.Errorf("alert record % x, want % x", got, want)
	}
	c.Close()
	<-done
}

// crypto/tls must understand the record as what it is meant to be.
func TestRefuseIsUnderstood(t *testing.T) {
	for description, want := range map[byte]string{
		UnrecognizedName:      "unrecognized name",
		NoApplicationProtocol: "no application protocol",
		DecodeError:           "error decoding message",
		InternalError:         "internal error",
	} {
		c, s := testtcp.Pair(t)
		done := make(chan struct{})
		go func() { defer close(done); Refuse(s, description) }()
		err := tls.Client(c, &tls.Config{ServerName: "a.example", MinVersion: tls.VersionTLS13}).Handshake()
		var remote *net.OpError
		if !errors.As(err, &remote) || remote.Op != "remote error" || !strings.Contains(err.Error(), want) {
			t.Errorf("alert %d: handshake error %v, want remote error %q", description, err, want)
		}
		c.Close()
		<-done
	}
}

// A peer that neither reads nor ends is reset, and not waited for by the kernel:
// a relay between the two would hold its half as long.
func TestWhoStaysIsReset(t *testing.T) {
	c, s := testtcp.Pair(t)
	Refuse(s, DecodeError)
	if got, err := io.ReadAll(c); err != nil || len(got) != 7 {
		t.Errorf("read % x, %v", got, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write: %v, want a connection that was reset", err)
	}
}

func TestRefuseIsBounded(t *testing.T) {
	_, s := testtcp.Pair(t) // the client neither closes nor reads
	start := time.Now()
	Refuse(s, DecodeError)
	if d := time.Since(start); d < Budget/2 || d > 3*Budget {
		t.Errorf("Refuse took %v with a peer that stays, want about %v", d, Budget)
	}
}
