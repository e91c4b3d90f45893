package locator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// hedgeAfter is how long one candidate has before the next is tried beside it.
// A connection across an ocean takes less.
const hedgeAfter = 250 * time.Millisecond

// startAll is how long it takes at most until every candidate has been started:
// where there are many, each has less time. However many addresses are dead, the
// last one's turn comes soon.
const startAll = 2 * time.Second

// errSlow is what overtook a candidate means.
var errSlow = fmt.Errorf("no answer in %v while another answered", hedgeAfter)

// An outcome is how one candidate of a race ended.
type outcome struct {
	conn net.Conn
	err  error
	took time.Duration
	// lost tells that another had won by then; overtaken, that it had done so
	// although it was started later.
	lost, overtaken bool
}

// verdict is what the outcome says about the candidate: nil that it works. It is
// not known for one that was called off before it could answer, be it by the
// winner or by ctx, and for one that failed by a fault of our own.
func (o outcome) verdict(ctx context.Context) (known bool, err error) {
	switch {
	case o.err == nil:
		return true, nil
	case o.lost:
		return o.overtaken && o.took >= hedgeAfter, errSlow
	case errors.Is(ctx.Err(), context.Canceled), isOver(ctx) && o.took < hedgeAfter, isOurs(o.err):
		return false, nil
	}
	return true, o.err
}

// isOver tells whether ctx has ended, or has its deadline behind it: a socket has the
// same one, and may be told of it first.
func isOver(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

// isOurs tells errors that have nothing to do with who was dialled.
func isOurs(err error) bool {
	for _, ours := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, ours) {
			return true
		}
	}
	return false
}

// race dials n candidates, at least one, in turn: the next one starts when one
// has failed or none has answered for hedgeAfter, or sooner where there are many.
// The first connection wins, and the others are called off, waited for and closed.
// It returns the winner, -1 if there is none, and how each candidate that was
// started ended.
func race(ctx context.Context, n int, dial func(ctx context.Context, i int) (net.Conn, error)) (winner int, outcomes []outcome) {
	if n == 1 { // against nobody
		began := time.Now()
		c, err := dial(ctx, 0)
		if err != nil {
			winner = -1
		}
		return winner, []outcome{{conn: c, err: err, took: time.Since(began)}}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		i int
		outcome
	}
	results := make(chan result)
	start := func() {
		i := len(outcomes)
		outcomes = append(outcomes, outcome{})
		go func() {
			began := time.Now()
			c, err := dial(ctx, i)
			results <- result{i, outcome{conn: c, err: err, took: time.Since(began)}}
		}()
	}
	winner = -1
	patience := min(hedgeAfter, startAll/time.Duration(n))
	hedge := time.NewTimer(patience)
	defer hedge.Stop()
	start()
	for running := 1; running > 0; {
		next := true
		select {
		case r := <-results:
			running--
			next = r.err != nil
			r.lost, r.overtaken = winner >= 0, winner > r.i
			if r.lost && r.conn != nil {
				_ = r.conn.Close()
				r.conn = nil
			}
			outcomes[r.i] = r.outcome
			if r.err == nil && !r.lost {
				winner = r.i
				cancel()
			}
		case <-hedge.C:
		}
		if next && winner < 0 && len(outcomes) < n && ctx.Err() == nil {
			start()
			running++
			hedge.Reset(patience)
		}
	}
	return winner, outcomes
}
