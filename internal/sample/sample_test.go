package sample

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

func TestFirstThenOneInTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sampler
		if left, ok := s.Allow("a"); !ok || left != 0 {
			t.Errorf("first: %d, %v", left, ok)
		}
		for range 3 {
			if _, ok := s.Allow("a"); ok {
				t.Error("allowed again at once")
			}
		}
		if _, ok := s.Allow("b"); !ok {
			t.Error("another key was held back")
		}
		time.Sleep(Every)
		if left, ok := s.Allow("a"); !ok || left != 3 {
			t.Errorf("after ten seconds: %d, %v, want 3, true", left, ok)
		}
	})
}

func TestKeysAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sampler
		allowed := 0
		for i := range 3 * MaxKeys {
			if _, ok := s.Allow(strconv.Itoa(i)); ok {
				allowed++
			}
		}
		if len(s.keys) > MaxKeys+1 || allowed != MaxKeys+1 {
			t.Errorf("%d keys kept, %d lines allowed, want %d of each", len(s.keys), allowed, MaxKeys+1)
		}
		time.Sleep(Every)
		if _, ok := s.Allow("new"); !ok || len(s.keys) > MaxKeys {
			t.Errorf("old keys were not forgotten: %d kept", len(s.keys))
		}
	})
}
