package h2

import "sync"

// A tally counts what is under way and can be waited for, where more may begin at
// any time.
type tally struct {
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

// enter reports false after close: nothing may begin.
func (t *tally) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	return true
}

func (t *tally) leave() { t.wg.Done() }

// close lets nothing more begin and waits for what has.
func (t *tally) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.wg.Wait()
}
