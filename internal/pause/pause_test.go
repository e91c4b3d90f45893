package pause

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		if !For(ctx, time.Minute) || time.Since(began) != time.Minute {
			t.Errorf("with a context that lives: back after %v", time.Since(began))
		}
		if !For(ctx, -time.Second) || time.Since(began) != time.Minute {
			t.Error("nothing to wait for took time")
		}
		time.AfterFunc(time.Second, cancel)
		if For(ctx, time.Hour) || time.Since(began) != time.Minute+time.Second {
			t.Errorf("with a context that ends: back after %v", time.Since(began))
		}
		if For(ctx, 0) {
			t.Error("with a context that has ended it waits")
		}
	})
}

// Whether Done was asked for before or not, it is as context.WithTimeout.
func TestWithin(t *testing.T) {
	type step struct {
		name string
		do   func(end, cancel func())
		want error
	}
	for _, s := range []step{
		{"alive", func(func(), func()) { time.Sleep(59 * time.Second) }, nil},
		{"late", func(func(), func()) { time.Sleep(time.Minute) }, context.DeadlineExceeded},
		{"canceled", func(_, cancel func()) { cancel() }, context.Canceled},
		{"canceled late", func(_, cancel func()) { cancel(); time.Sleep(time.Hour) }, context.Canceled},
		{"late and canceled", func(_, cancel func()) { time.Sleep(time.Hour); cancel() }, context.DeadlineExceeded},
		{"parent ended", func(end, _ func()) { end() }, context.Canceled},
	} {
		for _, asked := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				parent, end := context.WithCancel(t.Context())
				defer end()
				ctx, cancel := Within(parent, time.Minute)
				defer cancel()
				if asked {
					_ = ctx.Done()
				}
				s.do(end, cancel)
				synctest.Wait()
				if err := ctx.Err(); err != s.want {
					t.Errorf("%s, asked %v: %v, want %v", s.name, asked, err, s.want)
				}
				select {
				case <-ctx.Done():
					if s.want == nil {
						t.Errorf("%s, asked %v: done", s.name, asked)
					}
				default:
					if s.want != nil {
						t.Errorf("%s, asked %v: not done", s.name, asked)
					}
				}
			})
		}
	}
}

func TestWithinAParentsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, end := context.WithTimeout(t.Context(), time.Second)
		defer end()
		ctx, cancel := Within(parent, time.Minute)
		defer cancel()
		if d, ok := ctx.Deadline(); !ok || time.Until(d) != time.Second {
			t.Errorf("deadline in %v", time.Until(d))
		}
		<-ctx.Done()
		if ctx.Err() != context.DeadlineExceeded {
			t.Errorf("Err: %v", ctx.Err())
		}
	})
}
