package locator

import (
	"context"
	"net"
	"time"
)

// hedgeAfter is how long one candidate has before the next is tried beside it.
// A connection across an ocean takes less.
const hedgeAfter = 250 * time.Millisecond

// An outcome is how one candidate of a race ended.
type outcome struct {
	conn net.Conn
	err  error
	// lost tells that the candidate was called off because another had won;
	// slow, that it had its time by then and had not answered.
	lost, slow bool
}

// race dials n candidates in turn: the next one starts when the last has
// failed or has not answered for hedgeAfter. The first connection wins, and
// the others are called off, waited for and closed. It returns the winner, -1
// if there is none, and how each candidate that was started ended.
func race(ctx context.Context, n int, dial func(ctx context.Context, i int) (net.Conn, error)) (winner int, outcomes []outcome) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		i    int
		conn net.Conn
		err  error
	}
	results := make(chan result)
	outcomes = make([]outcome, 0, n)
	began := make([]time.Time, n)
	start := func() {
		i := len(outcomes)
		outcomes = append(outcomes, outcome{})
		began[i] = time.Now()
		go func() {
			c, err := dial(ctx, i)
			results <- result{i, c, err}
		}()
	}
	winner = -1
	hedge := time.NewTimer(hedgeAfter)
	defer hedge.Stop()
	start()
	for running := 1; running > 0; {
		next := false
		select {
		case r := <-results:
			running--
			won := winner >= 0
			if won && r.conn != nil {
				_ = r.conn.Close()
				r.conn = nil
			}
			outcomes[r.i] = outcome{conn: r.conn, err: r.err, lost: won, slow: won && time.Since(began[r.i]) >= hedgeAfter}
			if r.err == nil && !won {
				winner = r.i
				cancel()
			}
			next = r.err != nil
		case <-hedge.C:
			next = true
		}
		if next && winner < 0 && len(outcomes) < n && ctx.Err() == nil {
			start()
			running++
			hedge.Reset(hedgeAfter)
		}
	}
	return winner, outcomes
}
