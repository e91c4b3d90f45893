// Package pause waits for a while, or until a context ends.
//
//	if !pause.For(ctx, backoff) { return }
package pause

import (
	"context"
	"time"
)

// For waits for d, which may be none, and returns true. If ctx ends first, or has
// ended, it returns false at once.
func For(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
