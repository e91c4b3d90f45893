package certs

import (
	"crypto"
	"fmt"
	"io"
)

// A signingKey is a private key that can sign and do nothing else: printed,
// marshalled or logged, alone or inside a tls.Config, it is [redacted]. The
// signer is behind a pointer since fmt looks into unexported fields without
// asking the methods of what it finds there, but not behind pointers.
type signingKey struct{ signer *crypto.Signer }

var _ crypto.Signer = signingKey{}

const redacted = "[redacted]"

func (k signingKey) Public() crypto.PublicKey { return (*k.signer).Public() }

func (k signingKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return (*k.signer).Sign(random, digest, opts)
}

// Format covers every verb of fmt.
func (signingKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

func (signingKey) String() string { return redacted }

// MarshalText covers encoding/json and with it zap's reflection.
func (signingKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }
