package session

import (
	"bytes"
	"encoding/hex"
	"os"
	"strings"
	"sync"
	"testing"

	"culvert/internal/testtcp"
)

// example reads a block of hex digits of docs/wire.md.
func example(t *testing.T, name string) []byte {
	t.Helper()
	page, err := os.ReadFile("../../docs/wire.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(page), "```hex "+name+"\n")
	block, _, closed := strings.Cut(rest, "```")
	if !ok || !closed {
		t.Fatalf("docs/wire.md has no example %q", name)
	}
	b, err := hex.DecodeString(strings.Join(strings.Fields(block), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// recording is a connection that keeps what was written.
type recording struct {
	tcp
	mu      sync.Mutex
	written bytes.Buffer
}

func (c *recording) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.written.Write(p)
	c.mu.Unlock()
	return c.tcp.Write(p)
}

func (c *recording) take() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := bytes.Clone(c.written.Bytes())
	c.written.Reset()
	return b
}

// TestWireExamples holds docs/wire.md against what a dialler writes. Nobody answers,
// so nothing comes between.
func TestWireExamples(t *testing.T) {
	a, _ := testtcp.Pair(t)
	c := &recording{tcp: tcp{a}}
	s, err := Dial(c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	st := open(t, s, "rpc")
	if _, err := st.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	if got, want := c.take(), example(t, "session"); !bytes.Equal(got, want) {
		t.Errorf("wrote\n%x, the example is\n%x", got, want)
	}
	if err := st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, want := c.take(), example(t, "session-end"); !bytes.Equal(got, want) {
		t.Errorf("ended with\n%x, the example is\n%x", got, want)
	}
	s.Abort()
	s.Wait()
}
