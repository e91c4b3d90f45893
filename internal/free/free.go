// Package free keeps objects that are costly to make for whoever needs one next.
//
//	var buffers free.List[[65536]byte]
//	b := buffers.Get()
//	defer buffers.Put(b)
//
// Unlike a [sync.Pool] a List does not lose them when garbage is collected, so that
// what uses one allocates nothing in the long run; and it is bounded. A List may be
// used from any number of goroutines; its zero value is empty.
package free

import "sync"

// most is how many objects wait in a List. More are in use at once only while as many
// goroutines run; those then go to the garbage.
const most = 8

// A List of objects that are free.
type List[T any] struct {
	mu   sync.Mutex
	n    int
	free [most]*T
}

// Get returns the object that was put back last, with whatever is in it, or a new
// one, which is zero.
func (l *List[T]) Get() *T {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n == 0 {
		return new(T)
	}
	l.n--
	v := l.free[l.n]
	l.free[l.n] = nil
	return v
}

// Put gives an object back, to which nothing else may refer.
func (l *List[T]) Put(v *T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n < most {
		l.free[l.n] = v
		l.n++
	}
}
