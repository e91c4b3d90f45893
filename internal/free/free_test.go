package free

import "testing"

func TestList(t *testing.T) {
	var l List[int]
	var all []*int
	for i := range most + 2 {
		v := l.Get()
		if *v != 0 {
			t.Fatalf("a new one is %d", *v)
		}
		*v = i + 1
		all = append(all, v)
	}
	for _, v := range all {
		l.Put(v)
	}
	for i := range most {
		if v := l.Get(); *v != most-i {
			t.Errorf("got %d, want %d: the last one first", *v, most-i)
		}
	}
	if v := l.Get(); *v != 0 {
		t.Errorf("more than %d are kept", most)
	}
	if n := testing.AllocsPerRun(100, func() { l.Put(l.Get()) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
