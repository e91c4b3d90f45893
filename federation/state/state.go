package state

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
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
	entries map[string]*entry // by datacenter
	gone    []gone            // the last that went, in order
	missing uint64            // what went up to this index is not in gone any more
	left    map[Key]Departure

	order []string // of the datacenters
	once  sync.Once
	hash  string
}

// An entry is a record with its one form in JSON, which is made once however
// many ask for it.
type entry struct {
	Record
	raw json.RawMessage
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
	out := make([]*Record, len(s.order))
	for i, dc := range s.order {
		out[i] = &s.entries[dc].Record
	}
	return out
}

// Record finds a datacenter's record, nil if there is none. It must not be changed.
func (s *State) Record(datacenter string) *Record {
	if e := s.entries[datacenter]; e != nil {
		return &e.Record
	}
	return nil
}

// Raw is Record in JSON, nil if there is none.
func (s *State) Raw(datacenter string) json.RawMessage {
	if e := s.entries[datacenter]; e != nil {
		return e.raw
	}
	return nil
}

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
		for _, dc := range s.order {
			h.Write(s.entries[dc].raw)
		}
		s.hash = hex.EncodeToString(h.Sum(nil)[:16])
	})
	return s.hash
}

// All returns all records in JSON, in the order of datacenters.
func (s *State) All() []json.RawMessage {
	out := make([]json.RawMessage, len(s.order))
	for i, dc := range s.order {
		out[i] = s.entries[dc].raw
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
	for _, dc := range s.order {
		if e := s.entries[dc]; e.Index > since {
			changes = append(changes, e.raw)
		}
	}
	for _, g := range s.gone {
		if g.Index > since && s.entries[g.Datacenter] == nil {
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
		next.entries = make(map[string]*entry, len(records))
	}
	var faults []error
	for _, raw := range records {
		e := &entry{raw: slices.Clone(raw)}
		err := json.Unmarshal(raw, &e.Record)
		if err == nil {
			err = e.Check()
		}
		switch {
		case err != nil:
			faults = append(faults, fmt.Errorf("record of datacenter %q: %w", e.Datacenter, err))
			if old := s.entries[e.Datacenter]; old != nil {
				next.entries[e.Datacenter] = old
			}
		case e.Removed:
			delete(next.entries, e.Datacenter)
		case len(next.entries) >= MaxDatacenters && next.entries[e.Datacenter] == nil:
			faults = append(faults, fmt.Errorf("record of datacenter %q: more than %d of them", e.Datacenter, MaxDatacenters))
		default:
			next.entries[e.Datacenter] = e
		}
	}
	if !next.ordered() {
		next.order = slices.Sorted(maps.Keys(next.entries))
	}
	if len(faults) > 0 {
		return next, Faults(faults)
	}
	return next, nil
}

// ordered tells whether the order is that of the entries: most changes are of
// records that were there before.
func (s *State) ordered() bool {
	if len(s.order) != len(s.entries) {
		return false
	}
	for _, dc := range s.order {
		if s.entries[dc] == nil {
			return false
		}
	}
	return true
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
	n := &State{store: s.store, index: index, entries: maps.Clone(s.entries), gone: s.gone, missing: s.missing, left: s.left, order: s.order}
	if n.entries == nil {
		n.entries = make(map[string]*entry)
	}
	return n
}

// put makes r a record, or takes it away if nothing is left in it.
func (s *State) put(r *Record, at time.Time) {
	r.Index, r.UpdatedAt = s.index, at
	i, known := slices.BinarySearch(s.order, r.Datacenter)
	if len(r.Servers) == 0 && len(r.Gateways) == 0 {
		if known {
			delete(s.entries, r.Datacenter)
			s.order = slices.Delete(slices.Clone(s.order), i, i+1)
			s.gone = append(slices.Clone(s.gone), gone{r.Datacenter, s.index, at})
			if len(s.gone) > maxGone {
				s.missing, s.gone = s.gone[0].Index, s.gone[1:]
			}
		}
		return
	}
	s.entries[r.Datacenter] = &entry{Record: *r, raw: r.encode()}
	if !known {
		s.order = slices.Insert(slices.Clone(s.order), i, r.Datacenter)
	}
}

// edit is a copy of a record that is to be changed and put; an empty one where
// there is none.
func (s *State) edit(datacenter string) *Record {
	e := s.entries[datacenter]
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
