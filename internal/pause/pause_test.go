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
