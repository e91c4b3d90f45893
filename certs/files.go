package certs

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

const (
	maxFile    = 1 << 20 // bytes; a bundle of several hundred certificates
	othersMode = 0o007
)

// readFile reads a PEM file. Its errors name the path.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read file: %w", err)
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read file: %w", err)
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("read file %s: longer than %d bytes", path, maxFile)
	}
	return content, nil
}

// parseCertificates returns every certificate of a PEM text, at least one, and
// passes over what is not a certificate.
func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d: %w", len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no PEM certificate in it")
	}
	return all, nil
}

// parseKey returns the first private key of a PEM text.
func parseKey(text []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		if block == nil {
			return nil, errors.New("there is no PEM private key in it")
		}
		var (
			key any
			err error
		)
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errors.New("the private key is encrypted, and there is nobody to ask for its password")
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("parse private key: %w", err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a private key of type %T cannot sign", key)
		}
		return signer, nil
	}
}

func samePublic(a, b crypto.PublicKey) bool {
	public, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(b)
}

// writePair writes a certificate and its key, both or neither, over nothing
// that exists.
func writePair(certFile string, certPEM []byte, keyFile string, keyPEM []byte) error {
	for _, path := range []string{certFile, keyFile} {
		if _, err := os.Lstat(path); err == nil {
			return &existsError{path}
		}
	}
	if err := writeNew(keyFile, keyPEM, 0o600); err != nil {
		return err
	}
	if err := writeNew(certFile, certPEM, 0o644); err != nil {
		return errors.Join(err, os.Remove(keyFile)) // which was made just now
	}
	return nil
}

// writeNew makes a file that is whole from the moment it has its name. A hard
// link, unlike a rename, fails where the name is taken; a file system without
// them gets an empty file of that name first, which is then replaced.
func writeNew(path string, content []byte, mode os.FileMode) error {
	temporary, err := writeTemporary(path, content, mode)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() { _ = os.Remove(temporary) }()
	if err = os.Link(temporary, path); err == nil {
		return nil
	}
	if errors.Is(err, os.ErrExist) {
		return &existsError{path}
	}
	return replaceReserved(temporary, path)
}

// replaceReserved makes an empty file, which takes the name, and puts the whole one in its place.
func replaceReserved(temporary, path string) error {
	reserved, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return &existsError{path}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err = errors.Join(reserved.Close(), os.Rename(temporary, path)); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// writeTemporary writes a file beside path, and returns its name once the disk has it.
func writeTemporary(path string, content []byte, mode os.FileMode) (name string, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // O_EXCL, mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// An existsError is a file that would have to be overwritten.
type existsError struct{ path string }

func (e *existsError) Error() string { return e.path + " exists, and is not overwritten" }
func (e *existsError) Hint() string  { return "move it away, or work in another folder" }
func (e *existsError) Unwrap() error { return os.ErrExist }
