package federation

import (
	"slices"
	"time"

	"go.uber.org/zap"

	"culvert/federation/state"
)

// A Status is how a process stands in its federation, as /v1/status has it.
type Status struct {
	Primary     string     `json:"primary_datacenter"`
	Role        string     `json:"role"`  // of the own datacenter: primary or secondary
	Store       string     `json:"store"` // its name, "" while none is known
	Index       uint64     `json:"index"`
	Leader      string     `json:"leader"`       // in the primary's sidecars: who leads the store
	Waiting     string     `json:"waiting"`      // there: what the store waits for before it has begun
	Contact     *time.Time `json:"last_contact"` // elsewhere: of the last answer of the primary
	Registered  *time.Time `json:"registered"`   // when the own entry was renewed last
	Left        bool       `json:"left"`         // it was taken away
	KeptOut     []Refusal  `json:"kept_out"`     // entries that are not taken, and why
	LastError   string     `json:"last_error"`   // of reading
	LastRefusal string     `json:"registration_error"`
}

// NewStatus returns what is the same for all processes: those of a datacenter, in
// the federation of a primary one.
func NewStatus(datacenter, primary string, known *state.State, own RegistrarStatus, keptOut ...[]Refusal) *Status {
	role := "secondary"
	if datacenter == primary {
		role = "primary"
	}
	return &Status{
		Primary: primary, Role: role, Store: known.Store(), Index: known.Index(),
		Registered: orNil(own.Renewed), Left: own.Left, LastRefusal: own.LastError,
		KeptOut: append([]Refusal{}, slices.Concat(keptOut...)...),
	}
}

// Follows adds how a replica stands to the primary.
func (s *Status) Follows(r ReplicaStatus) *Status {
	s.Contact, s.LastError = orNil(r.Contact), r.LastError
	return s
}

func orNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// LogNew logs each refusal that was not there before.
func LogNew(log *zap.Logger, before, now []Refusal) {
	for _, r := range now {
		if !slices.Contains(before, r) {
			log.Warn("entry kept out", zap.Stringer("entry", r.Key), zap.String("why", r.Why))
		}
	}
}
