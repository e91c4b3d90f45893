package alpn

import "runtime"

// turns bounds how many handshakes compute at once: half of the processors' worth, so
// that in a storm of them what is established has the others, and waits for no more
// than the one that is being made. A handshake that waits for its peer has no turn,
// so slow peers keep nobody out. A nil one bounds nothing.
type turns chan struct{}

func newTurns() turns { return make(turns, max(1, runtime.GOMAXPROCS(0)/2)) }

// begin waits for a turn, in the order of coming, and end gives it back.
func (t turns) begin() {
	if t != nil {
		t <- struct{}{}
	}
}

func (t turns) end() {
	if t != nil {
		<-t
	}
}

// inTurn calls what reads and writes through w and computes. Where it panics its turn
// is given back too.
func (w *wire) inTurn(f func() error) error {
	w.turns.begin()
	defer func() {
		w.turns.end()
		w.turns = nil
	}()
	return f()
}
