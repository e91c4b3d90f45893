package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
)

// decoded is everything that a Reader tells of an input.
type decoded struct {
	payloads [][]byte
	skipped  uint64
	err      error
}

func (d decoded) equal(o decoded) bool {
	if len(d.payloads) != len(o.payloads) || d.skipped != o.skipped || d.err.Error() != o.err.Error() {
		return false
	}
	for i := range d.payloads {
		if !bytes.Equal(d.payloads[i], o.payloads[i]) {
			return false
		}
	}
	return true
}

func decode(r *Reader) decoded {
	var d decoded
	for {
		p, err := r.Next()
		if err != nil {
			d.err, d.skipped = err, r.Skipped()
			return d
		}
		if p == nil {
			panic("a payload is nil")
		}
		d.payloads = append(d.payloads, bytes.Clone(p))
	}
}

func decodeBytes(b []byte) decoded { return decode(NewReader(bytes.NewReader(b))) }

// model decodes as docs/wire.md says, from the whole input at once.
func model(b []byte) decoded {
	var d decoded
	for {
		if len(b) < HeaderLen {
			d.err = io.EOF
			if len(b) > 0 {
				d.err = io.ErrUnexpectedEOF
			}
			return d
		}
		size := int64(binary.BigEndian.Uint32(b))
		b = b[HeaderLen:]
		if size > 4194304 {
			d.err = &FrameTooLargeError{Size: size, Limit: 4194304}
			return d
		}
		if size > 65507 {
			d.skipped++
		}
		if size > int64(len(b)) {
			d.err = io.ErrUnexpectedEOF
			return d
		}
		if size <= 65507 {
			d.payloads = append(d.payloads, b[:size])
		}
		b = b[size:]
	}
}

func readHex(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parseHex(t, string(text))
}

func parseHex(t testing.TB, text string) []byte {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seed is an input followed by so many zero bytes: fuzzing is slow where the inputs themselves are long.
type seed struct {
	in  []byte
	pad int
}

func (s seed) bytes() []byte { return append(bytes.Clone(s.in), make([]byte, s.pad)...) }

const maxPad = MaxPayload + 100

// seeds are inputs that reach each branch of the reader. With either of its bounds taken out they fail by
// themselves, without fuzzing: see hostile.
func seeds(t testing.TB) []seed {
	native := readHex(t, "testdata/native.hex")
	return append(hostile(),
		seed{nil, 0},
		seed{native, 0},
		seed{native[:len(native)-1], 0},
		seed{[]byte{0, 0, 0x10, 0}, 4096},
		seed{[]byte{0, 0, 0x10, 1}, 4097},
		seed{[]byte{0, 0, 0xff, 0xe3}, MaxPayload + 2*HeaderLen}, // and two keepalives
	)
}

func hostile() []seed {
	return []seed{
		{[]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3}, 0},
		{[]byte{0x80, 0, 0, 0}, 100},
		{[]byte{0, 0x40, 0, 1, 9}, 0},                          // MaxFrame + 1
		{[]byte{0, 0x40, 0, 0, 9}, 0},                          // MaxFrame, cut
		{[]byte{0, 0, 0xff, 0xe4}, 0},                          // MaxPayload + 1, cut
		{[]byte{0, 0, 0xff, 0xe4}, MaxPayload + 1 + HeaderLen}, // skipped, and a keepalive
	}
}

func oversize(n int) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(n)), make([]byte, n)...)
}

// FuzzReader: the result is that of the model; how the input is split changes nothing; and the frames that were
// read, encoded again, are the input as far as it was whole (round trip).
func FuzzReader(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s.in, uint32(s.pad), uint8(3))
	}
	f.Fuzz(func(t *testing.T, in []byte, pad uint32, step uint8) {
		in = seed{in, int(pad % maxPad)}.bytes()
		want := model(in)
		for name, r := range map[string]*Reader{
			"whole":         NewReader(bytes.NewReader(in)),
			"in steps":      NewReader(&stepReader{b: in, step: int(step) + 1}),
			"end with data": NewReader(iotest.DataErrReader(bytes.NewReader(in))),
			"half":          NewReader(iotest.HalfReader(bytes.NewReader(in))),
			"large steps":   NewReader(&stepReader{b: in, step: 40_000}),
		} {
			got := decode(r)
			if !got.equal(want) {
				t.Fatalf("%s: got %d frames, skipped %d, %v; want %d, %d, %v", name,
					len(got.payloads), got.skipped, got.err, len(want.payloads), want.skipped, want.err)
			}
		}
		if want.skipped > 0 {
			return
		}
		var again []byte
		for _, p := range want.payloads {
			again = AppendFrame(again, p)
		}
		if !bytes.HasPrefix(in, again) || want.err == io.EOF && len(again) != len(in) {
			t.Fatalf("encoded again: %d bytes, want a prefix of the input's %d", len(again), len(in))
		}
	})
}

// FuzzPrefix: of two frames each proper prefix ends in io.EOF between frames and in io.ErrUnexpectedEOF elsewhere,
// with the whole frames before it.
func FuzzPrefix(f *testing.F) {
	f.Add([]byte("hello"), uint16(0), []byte{}, uint16(0), uint32(3))
	f.Add([]byte{}, uint16(0), []byte("x"), uint16(0), uint32(4))
	f.Add([]byte{1}, uint16(40_000), []byte{2}, uint16(MaxPayload-1), uint32(70000))
	f.Fuzz(func(t *testing.T, a []byte, padA uint16, b []byte, padB uint16, cut uint32) {
		a, b = seed{a, int(padA)}.bytes(), seed{b, int(padB)}.bytes()
		a, b = a[:min(len(a), MaxPayload)], b[:min(len(b), MaxPayload)]
		one := AppendFrame(nil, a)
		in := AppendFrame(bytes.Clone(one), b)
		in = in[:int(cut)%len(in)]
		want, frames := io.ErrUnexpectedEOF, 0
		if len(in) == 0 || len(in) == len(one) {
			want = io.EOF
		}
		if len(in) >= len(one) {
			frames = 1
		}
		got := decodeBytes(in)
		if got.err != want || len(got.payloads) != frames {
			t.Fatalf("cut at %d of %d+%d: %d frames, %v; want %d, %v", len(in), len(a), len(b),
				len(got.payloads), got.err, frames, want)
		}
	})
}

func TestSeedsReachEachBranch(t *testing.T) {
	var good, keepalive, skipped, tooLarge, cut bool
	for _, s := range seeds(t) {
		d := model(s.bytes())
		var large *FrameTooLargeError
		tooLarge = tooLarge || errors.As(d.err, &large)
		cut = cut || d.err == io.ErrUnexpectedEOF
		skipped = skipped || d.skipped > 0 && len(d.payloads) > 0
		for _, p := range d.payloads {
			good = good || len(p) > 4096
			keepalive = keepalive || len(p) == 0
		}
	}
	if !good || !keepalive || !skipped || !tooLarge || !cut {
		t.Fatalf("seeds lack a case: large frame %v, keepalive %v, skipped %v, too large %v, cut %v",
			good, keepalive, skipped, tooLarge, cut)
	}
}

func TestHostileLengthCostsNothing(t *testing.T) {
	for _, s := range hostile() {
		in := s.bytes()
		src := &countingReader{r: bytes.NewReader(in)}
		r := NewReader(src)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for {
			if _, err := r.Next(); err != nil {
				break
			}
		}
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > readBuffer+8<<10 {
			t.Errorf("% x...: %d bytes allocated", in[:4], got)
		}
		if src.n > len(in) {
			t.Errorf("% x...: %d bytes read of %d", in[:4], src.n, len(in))
		}
	}

	// What follows a refused header is not read.
	src := &countingReader{r: io.MultiReader(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff}), endless{})}
	_, err := NewReader(src).Next()
	var large *FrameTooLargeError
	if !errors.As(err, &large) || large.Size != 0xffffffff || large.Limit != MaxFrame {
		t.Fatalf("got %v, want a FrameTooLargeError of 4294967295 bytes", err)
	}
	if src.n > readBuffer {
		t.Errorf("%d bytes read after the header of a refused frame", src.n)
	}
}

func TestReaderErrorIsFinal(t *testing.T) {
	r := NewReader(io.MultiReader(bytes.NewReader([]byte{0xff, 0, 0, 0}), bytes.NewReader(AppendFrame(nil, []byte("later")))))
	_, first := r.Next()
	if p, err := r.Next(); p != nil || err != first {
		t.Fatalf("got %q, %v after %v", p, err, first)
	}
}

func TestReaderPassesOtherErrors(t *testing.T) {
	_, err := NewReader(iotest.TimeoutReader(iotest.OneByteReader(bytes.NewReader([]byte{0, 0, 0, 1, 5})))).Next()
	if !errors.Is(err, iotest.ErrTimeout) {
		t.Fatalf("got %v, want the reader's own error", err)
	}
}

func TestReaderAllocates(t *testing.T) {
	for _, size := range []int{100, 1400, MaxPayload} {
		r := NewReader(&loop{b: AppendFrame(nil, make([]byte, size))})
		if n := testing.AllocsPerRun(100, func() {
			if _, err := r.Next(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations for a frame of %d bytes", n, size)
		}
	}
}

// TestWireExample holds docs/wire.md against the codec.
func TestWireExample(t *testing.T) {
	page, err := os.ReadFile("../docs/wire.md")
	if err != nil {
		t.Fatal(err)
	}
	block := func(name string) []byte {
		_, rest, ok := strings.Cut(string(page), "```hex "+name+"\n")
		text, _, end := strings.Cut(rest, "```")
		if !ok || !end {
			t.Fatalf("docs/wire.md has no example %q", name)
		}
		return parseHex(t, text)
	}
	if want := AppendFrame(nil, nil); !bytes.Equal(block("answer"), want) {
		t.Errorf("answer: % x, want % x", block("answer"), want)
	}
	if want := AppendFrame(AppendFrame(nil, nil), []byte("hello")); !bytes.Equal(block("offer"), want) {
		t.Errorf("offer: % x, want % x", block("offer"), want) // and TestTwoWay: it is what a link writes
	}
	packets := AppendFrame(AppendFrame(nil, []byte("hello")), []byte{1, 2, 3})
	if got := block("packets"); !bytes.Equal(got, packets) {
		t.Errorf("packets: % x, want % x", got, packets)
	}
	if d := decodeBytes(block("packets")); !d.equal(model(packets)) || len(d.payloads) != 2 {
		t.Errorf("packets decode as %q, %v", d.payloads, d.err)
	}
	skip := append(block("skipped"), make([]byte, MaxPayload+1)...)
	if d := decodeBytes(skip); d.skipped != 1 || d.err != io.EOF {
		t.Errorf("skipped: skipped %d, %v", d.skipped, d.err)
	}
	var large *FrameTooLargeError
	if d := decodeBytes(block("refused")); !errors.As(d.err, &large) || large.Size != MaxFrame+1 {
		t.Errorf("refused: %v", d.err)
	}
	for _, limit := range []string{"65,507", "65,508", "4,194,304", "4,194,305"} {
		if !bytes.Contains(page, []byte(limit)) {
			t.Errorf("docs/wire.md does not name the limit %s", limit)
		}
	}
}

func BenchmarkReader(b *testing.B) {
	frame := AppendFrame(nil, make([]byte, 1400))
	r := NewReader(&loop{b: frame})
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Next(); err != nil {
			b.Fatal(err)
		}
	}
}

// stepReader gives step bytes at most at a time.
type stepReader struct {
	b    []byte
	step int
}

func (r *stepReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), r.step)], r.b)
	r.b = r.b[n:]
	return n, nil
}

type countingReader struct {
	r io.Reader
	n int
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += n
	return n, err
}

// loop gives the same bytes for ever.
type loop struct {
	b   []byte
	pos int
}

func (r *loop) Read(p []byte) (int, error) {
	n := copy(p, r.b[r.pos:])
	r.pos = (r.pos + n) % len(r.b)
	return n, nil
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
