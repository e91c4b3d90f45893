package certs

import (
	"crypto/x509"
	"slices"
)

// An Admission says from whom a protocol is taken. The zero Admission admits
// nobody.
type Admission struct {
	Roles []Role
	// SameDatacenter admits peers of the own certificate's datacenter alone. It
	// is no name that could be left empty by mistake, and then mean any.
	SameDatacenter bool
}

// check tells whether a verified certificate of an identity is admitted by the
// holder of own. The error is a [*PeerError].
func (a Admission) check(own, id Identity, cert *x509.Certificate) error {
	if !slices.Contains(a.Roles, id.Role) {
		return &PeerError{
			Reason: ReasonRole,
			Wanted: a.wantedRole(),
			Found:  "role " + string(id.Role) + ", " + describe(cert),
		}
	}
	if a.SameDatacenter && id.Datacenter != own.Datacenter {
		return &PeerError{
			Reason: ReasonDatacenter,
			Wanted: "datacenter " + own.Datacenter,
			Found:  "datacenter " + id.Datacenter + ", " + describe(cert),
		}
	}
	return nil
}

func (a Admission) wantedRole() string {
	wanted := "no role"
	for i, r := range a.Roles {
		if i == 0 {
			wanted = "role " + string(r)
		} else {
			wanted += " or " + string(r)
		}
	}
	return wanted
}
