package connset

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/internal/memnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDrainWaitsForTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		a, b := net.Pipe()
		removeA, _ := s.Add(a)
		removeB, _ := s.Add(b)
		if s.Len() != 2 {
			t.Errorf("Len = %d, want 2", s.Len())
		}
		drained := make(chan int)
		go func() { drained <- s.Drain(t.Context()) }()
		synctest.Wait()
		if _, ok := s.Add(a); ok {
			t.Error("a connection was added during the drain")
		}
		removeA()
		removeA()
		select {
		case <-drained:
			t.Fatal("drained with one connection left")
		default:
		}
		removeB()
		if n := <-drained; n != 0 {
			t.Errorf("Drain = %d, want 0", n)
		}
		if n := s.Drain(t.Context()); n != 0 {
			t.Errorf("second Drain = %d, want 0", n)
		}
	})
}

func TestDrainAbortsWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		a, b := memnet.Pipe()
		remove, _ := s.Add(a)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if n := s.Drain(ctx); n != 1 {
			t.Errorf("Drain = %d, want 1", n)
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("Drain took %v, want its whole second", took)
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the peer reads %v, want a reset", err)
		}
		// What was aborted is there until its owner has done with it.
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if n := s.Drain(ctx); n != 1 {
			t.Errorf("Drain before the removal = %d, want 1", n)
		}
		remove()
		if n := s.Drain(t.Context()); n != 0 || s.Len() != 0 {
			t.Errorf("Drain after the removal = %d with %d left, want 0", n, s.Len())
		}
	})
}

func TestDrainOfNothing(t *testing.T) {
	if n := New().Drain(t.Context()); n != 0 {
		t.Errorf("Drain = %d, want 0", n)
	}
}
