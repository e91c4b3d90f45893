package testpki

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Inside a bubble the clock starts in 2000, and certificates fit it.
func TestValidityFollowsTheClock(t *testing.T) {
	check := func(t *testing.T) {
		ca := New(t, "consul")
		leaf := ca.Leaf(t, Server("dc1", "alice"))
		verify := func() error {
			_, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), CurrentTime: time.Now(), DNSName: "alice.server.dc1.consul"})
			return err
		}
		if err := verify(); err != nil {
			t.Error(err)
		}
		past := ca.Leaf(t, NotAfter(time.Now().Add(-48*time.Hour)))
		if past.Leaf.NotAfter.After(time.Now()) || past.Leaf.NotAfter.Before(past.Leaf.NotBefore) {
			t.Errorf("valid from %v to %v", past.Leaf.NotBefore, past.Leaf.NotAfter)
		}
	}
	check(t)
	synctest.Test(t, func(t *testing.T) {
		if year := time.Now().Year(); year > 2000 {
			t.Fatalf("the bubble is in %d", year)
		}
		check(t)
	})
}

func TestOptionsAndFiles(t *testing.T) {
	ca := New(t, "consul")
	cases := []struct {
		options []Option
		names   []string
	}{
		{nil, nil},
		{[]Option{Server("dc1", "alice")}, []string{"alice.server.dc1.consul", "server.dc1.consul", "localhost"}},
		{[]Option{Server("dc1", "")}, []string{"server.dc1.consul", "localhost"}},
		{[]Option{Gateway("dc1", "gw1")}, []string{"gw1.gateway.dc1.consul", "gateway.dc1.consul", "localhost"}},
		{[]Option{Client("dc1"), Names("x")}, []string{"client.dc1.consul", "localhost", "x"}},
		{[]Option{Server("dc1", "alice"), NoNames()}, nil},
	}
	for _, c := range cases {
		leaf := ca.Leaf(t, c.options...)
		if !slices.Equal(leaf.Leaf.DNSNames, c.names) || (len(leaf.Leaf.IPAddresses) > 0) != slices.Contains(c.names, "localhost") {
			t.Errorf("names %q %v; want %q", leaf.Leaf.DNSNames, leaf.Leaf.IPAddresses, c.names)
		}
	}
	leaf := ca.Leaf(t, CommonName("x"), Usages(x509.ExtKeyUsageServerAuth))
	if leaf.Leaf.Subject.CommonName != "x" || !slices.Equal(leaf.Leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
		t.Errorf("subject %v, use %v", leaf.Leaf.Subject, leaf.Leaf.ExtKeyUsage)
	}
	caFile, certFile, keyFile := ca.WriteFiles(t, t.TempDir(), leaf)
	if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(caFile); err != nil || !x509.NewCertPool().AppendCertsFromPEM(content) {
		t.Errorf("the CA's file: %v", err)
	}
}
