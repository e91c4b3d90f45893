package certs

import (
	"crypto/sha256"
	"crypto/x509"
	"sync"
	"time"
)

// maxKnown bounds the chains that a [known] keeps.
const maxKnown = 4096

// known remembers which chains lead to a bundle, and for how long. To verify the
// signatures of a chain that has been verified before costs as much as the rest of
// a resumed handshake. It goes with its bundle: a chain is never known to another.
type known struct {
	mu     sync.Mutex
	chains map[chainKey]validity
}

// A chainKey stands for a chain, byte by byte, and its use.
type chainKey [sha256.Size]byte

// A validity is when a path of a chain to the bundle is valid in all its parts.
type validity struct{ from, to time.Time }

func keyOf(chain []*x509.Certificate, usage x509.ExtKeyUsage) chainKey {
	h := sha256.New()
	h.Write([]byte{byte(usage)}) //nolint:gosec // there are fourteen
	for _, c := range chain {    // DER says where it ends
		h.Write(c.Raw)
	}
	return chainKey(h.Sum(nil))
}

// has reports whether a chain has been verified, and what was found then holds.
func (k *known) has(key chainKey, now time.Time) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, ok := k.chains[key]
	return ok && !now.Before(v.from) && !now.After(v.to)
}

// add remembers a chain by the longest lasting of its paths.
func (k *known) add(key chainKey, paths [][]*x509.Certificate) {
	var longest validity
	for _, path := range paths {
		v := validity{from: path[0].NotBefore, to: path[0].NotAfter}
		for _, c := range path[1:] {
			if c.NotBefore.After(v.from) {
				v.from = c.NotBefore
			}
			if c.NotAfter.Before(v.to) {
				v.to = c.NotAfter
			}
		}
		if v.to.After(longest.to) {
			longest = v
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.chains) >= maxKnown {
		clear(k.chains)
	}
	k.chains[key] = longest
}

// admit verifies a chain as verify does, and remembers those that lead to the
// bundle.
func (t trust) admit(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	if len(chain) == 0 {
		_, err := t.verify(chain, usage, now)
		return err
	}
	key := keyOf(chain, usage)
	if t.known.has(key, now) {
		return nil
	}
	paths, err := t.verify(chain, usage, now)
	if err == nil {
		t.known.add(key, paths)
	}
	return err
}
