package state

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"
)

// maxGone bounds how many datacenters that are no more are remembered, for
// those who ask what has changed.
const maxGone = 256

// A State is all records at one moment. It never changes.
type State struct {
	store   string // names the store that it comes from; "" before there is one
	index   uint64
	entries []*entry // in the order of datacenters
	count   tally    // of what is in entries
	gone    []gone   // the last that went, in order
	missing uint64   // what went up to this index is not in gone any more
	left    map[Key]Departure

	once sync.Once
	hash string
}

type gone struct {
	Datacenter string    `json:"datacenter"`
	Index      uint64    `json:"index"`
	At         time.Time `json:"at"`
}

// A Departure is an entry that was taken away, so that the process that still
// runs does not bring it back.
type Departure struct {
	Start string    `json:"start"`
	At    time.Time `json:"at"`
}

// New returns a state without records.
func New() *State { return &State{} }

// Store names the store that the state comes from: indices of two stores have
// nothing to do with each other. It is "" for a state that comes from none.
func (s *State) Store() string { return s.store }

// Index is that of the last change.
func (s *State) Index() uint64 { return s.index }

// Len is the number of records.
func (s *State) Len() int { return len(s.entries) }

// Records returns all records in the order of datacenters. They must not be
// changed.
func (s *State) Records() []*Record {
	out := make([]*Record, len(s.entries))
	for i, e := range s.entries {
		out[i] = &e.Record
	}
	return out
}

// Record finds a datacenter's record, nil if there is none. It must not be changed.
func (s *State) Record(datacenter string) *Record {
	if e := s.entry(datacenter); e != nil {
		return &e.Record
	}
	return nil
}

// Raw is Record in JSON, nil if there is none.
func (s *State) Raw(datacenter string) json.RawMessage {
	if e := s.entry(datacenter); e != nil {
		return e.raw
	}
	return nil
}

// Count is the number of entries of a kind that have a health.
func (s *State) Count(k Kind, h Health) int { return *s.count.of(k, h) }

// Left tells whether an entry was taken away from a process.
func (s *State) Left(k Key, start string) bool {
	d, ok := s.left[k]
	return ok && d.Start == start
}

// Departed tells whether an entry was taken away for good: its process left.
func (s *State) Departed(k Key) bool {
	_, ok := s.left[k]
	return ok
}

// Hash is equal for states with equal records.
func (s *State) Hash() string {
	s.once.Do(func() {
		h := sha256.New()
		for _, e := range s.entries {
			h.Write(e.raw)
		}
		s.hash = hex.EncodeToString(h.Sum(nil)[:16])
	})
	return s.hash
}

// All returns all records in JSON, in the order of datacenters.
func (s *State) All() []json.RawMessage {
	out := make([]json.RawMessage, len(s.entries))
	for i, e := range s.entries {
		out[i] = e.raw
	}
	return out
}

// Changes returns what has changed in a store since an index: records as they
// are now, and removed ones. full means that it is all there is instead, as for
// another store or for an index too long ago.
func (s *State) Changes(store string, since uint64) (changes []json.RawMessage, full bool) {
	if store != s.store || since < s.missing {
		return s.All(), true
	}
	for _, e := range s.entries {
		if e.Index > since {
			changes = append(changes, e.raw)
		}
	}
	for _, g := range s.gone {
		if g.Index > since && s.entry(g.Datacenter) == nil {
			removed := Record{Datacenter: g.Datacenter, Index: g.Index, UpdatedAt: g.At, Removed: true}
			changes = append(changes, removed.encode())
		}
	}
	return changes, false
}

// With returns the state that a reader has after an answer of another process:
// changes, or all records where full is set. A record that is not possible is
// left out, as it was before if there was one, and the error names each.
func (s *State) With(store string, index uint64, records []json.RawMessage, full bool) (*State, error) {
	next := s.next(index)
	next.store = store
	next.gone, next.missing = nil, index // it was not there to see what went
	if full {
		next.entries, next.count = nil, tally{}
	}
	var faults []error
	for _, raw := range records {
		var r Record
		err := json.Unmarshal(raw, &r)
		if err == nil {
			err = r.Check()
		}
		switch {
		case err != nil:
			faults = append(faults, fmt.Errorf("record of datacenter %q: %w", r.Datacenter, err))
			if old := s.entry(r.Datacenter); old != nil {
				next.set(old)
			}
		case r.Removed:
			next.unset(r.Datacenter)
		case len(next.entries) >= MaxDatacenters && next.entry(r.Datacenter) == nil:
			faults = append(faults, fmt.Errorf("record of datacenter %q: more than %d of them", r.Datacenter, MaxDatacenters))
		default:
			next.set(newEntry(&r, slices.Clone(raw)))
		}
	}
	if len(faults) > 0 {
		return next, Faults(faults)
	}
	return next, nil
}

// Faults are records that were left out.
type Faults []error

func (f Faults) Error() string {
	if len(f) == 1 {
		return f[0].Error()
	}
	return fmt.Sprintf("%v, and %d more", f[0], len(f)-1)
}

// Unwrap returns the single errors.
func (f Faults) Unwrap() []error { return f }

// next is a copy that is to be changed. What is shared with s is never written.
func (s *State) next(index uint64) *State {
	return &State{
		store: s.store, index: index, entries: slices.Clone(s.entries), count: s.count,
		gone: s.gone, missing: s.missing, left: s.left,
	}
}

// put makes r a record, or takes it away if nothing is left in it.
func (s *State) put(r *Record, at time.Time) {
	r.Index, r.UpdatedAt = s.index, at
	if len(r.Servers)+len(r.Gateways) > 0 {
		s.set(newEntry(r, r.encode()))
		return
	}
	if !s.unset(r.Datacenter) {
		return
	}
	s.gone = append(slices.Clone(s.gone), gone{r.Datacenter, s.index, at})
	if len(s.gone) > maxGone {
		s.missing, s.gone = s.gone[0].Index, s.gone[1:]
	}
}

// edit is a copy of a record that is to be changed and put; an empty one where
// there is none.
func (s *State) edit(datacenter string) *Record {
	e := s.entry(datacenter)
	if e == nil {
		return &Record{Datacenter: datacenter}
	}
	r := e.Record
	r.Servers, r.Gateways = slices.Clone(r.Servers), slices.Clone(r.Gateways)
	return &r
}

// dump is a whole state on disk.
type dump struct {
	Version int               `json:"version"`
	Store   string            `json:"store"`
	Index   uint64            `json:"index"`
	Missing uint64            `json:"missing,omitempty"`
	Gone    []gone            `json:"gone,omitempty"`
	Left    []departed        `json:"left,omitempty"`
	Records []json.RawMessage `json:"records"`
}

type departed struct {
	Key
	Departure
}

const dumpVersion = 1

// MarshalJSON returns all of the state; [Load] is its inverse.
func (s *State) MarshalJSON() ([]byte, error) {
	d := dump{Version: dumpVersion, Store: s.store, Index: s.index, Missing: s.missing, Gone: s.gone, Records: s.All()}
	for k, left := range s.left {
		d.Left = append(d.Left, departed{k, left})
	}
	slices.SortFunc(d.Left, func(a, b departed) int { return a.compare(b.Key) })
	return json.Marshal(d)
}

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Datacenter, o.Datacenter), cmp.Compare(k.Kind, o.Kind), cmp.Compare(k.Name, o.Name))
}

// Load reads what MarshalJSON has written. A fault in it is an error: nothing
// was left out.
func Load(b []byte) (*State, error) {
	var d dump
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if d.Version != dumpVersion {
		return nil, fmt.Errorf("read state: it has version %d, want %d", d.Version, dumpVersion)
	}
	s, err := New().With(d.Store, d.Index, d.Records, true)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	s.missing, s.gone = d.Missing, d.Gone
	if len(d.Left) > 0 {
		s.left = make(map[Key]Departure, len(d.Left))
		for _, l := range d.Left {
			s.left[l.Key] = l.Departure
		}
	}
	return s, nil
}
