package certs

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"culvert/internal/testpki"
)

// What is remembered of a chain is worth nothing at another time, for another use or
// to another bundle.
func TestKnownChains(t *testing.T) {
	ca, other := testpki.New(t, "consul"), testpki.New(t, "consul")
	now := time.Now()
	trusted, strange := newTrust([]*x509.Certificate{ca.Cert}), newTrust([]*x509.Certificate{other.Cert})
	both := ca.Leaf(t, testpki.Server("dc2", "bob"), testpki.NotAfter(now.Add(time.Hour)))
	serverOnly := ca.Leaf(t, testpki.Server("dc2", "eve"), testpki.Usages(x509.ExtKeyUsageServerAuth))
	chain := []*x509.Certificate{both.Leaf}
	client, server := x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	for range 2 { // the second is known
		if err := trusted.admit(chain, client, now); err != nil {
			t.Fatal(err)
		}
		if err := trusted.admit([]*x509.Certificate{serverOnly.Leaf}, server, now); err != nil {
			t.Fatal(err)
		}
	}
	if !trusted.known.has(keyOf(chain, client), now) {
		t.Error("a chain that was verified is not known")
	}
	for what, c := range map[string]struct {
		err    error
		reason string
	}{
		"later":         {trusted.admit(chain, client, now.Add(2*time.Hour)), ReasonExpired},
		"earlier":       {trusted.admit(chain, client, both.Leaf.NotBefore.Add(-time.Second)), ReasonNotYetValid},
		"another use":   {trusted.admit([]*x509.Certificate{serverOnly.Leaf}, client, now), ReasonKeyUsage},
		"another CA":    {strange.admit(chain, client, now), ReasonOtherCA},
		"no chain":      {trusted.admit(nil, client, now), ReasonNoCertificate},
		"another chain": {trusted.admit([]*x509.Certificate{other.Leaf(t, testpki.Server("dc2", "bob")).Leaf}, client, now), ReasonOtherCA},
	} {
		refused, ok := errors.AsType[*PeerError](c.err)
		if !ok || refused.Reason != c.reason {
			t.Errorf("%s: %v, want %s", what, c.err, c.reason)
		}
	}
}

// The memory is bounded, and what fell out is verified anew.
func TestKnownIsBounded(t *testing.T) {
	ca := testpki.New(t, "consul")
	trusted := newTrust([]*x509.Certificate{ca.Cert})
	chain := []*x509.Certificate{ca.Leaf(t, testpki.Server("dc2", "bob")).Leaf}
	for i := range maxKnown + 1 {
		trusted.known.add(chainKey{byte(i), byte(i >> 8), 1}, [][]*x509.Certificate{chain})
	}
	if n := len(trusted.known.chains); n > maxKnown {
		t.Errorf("%d chains are kept", n)
	}
	if err := trusted.admit(chain, x509.ExtKeyUsageClientAuth, time.Now()); err != nil {
		t.Error(err)
	}
}
