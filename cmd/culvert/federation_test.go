package main

import (
	"os"
	"path/filepath"
	"testing"

	"culvert/internal/testpki"
)

// federated writes a file of each kind with a federation block.
func federated(t *testing.T, primary string) (sidecar, gateway string) {
	t.Helper()
	block := `federation {
  primary_datacenter = "` + primary + `"
  data_dir           = ""
  address            = "127.0.0.1:8443"
`
	sidecar = files(t, "alice", nil)
	text, err := os.ReadFile(sidecar)
	if err != nil {
		t.Fatal(err)
	}
	of, ofGateway := block+"}\n", block+"  retry_join = [\"127.0.0.1:8443\"]\n}\n"
	if primary != "dc1" {
		of = block + "  primary_gateways = [\"gw.example\"]\n}\n"
		ofGateway = of
	}
	if err := os.WriteFile(sidecar, append(text, of...), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := testpki.New(t, "consul")
	caFile, cert, key := ca.WriteFiles(t, dir, ca.Leaf(t, testpki.Gateway("dc1", "gw1")))
	gateway = filepath.Join(dir, "gateway.hcl")
	if err := os.WriteFile(gateway, []byte(`datacenter = "dc1"
node       = "gw1"
listen { address = "127.0.0.1:0" }
admin { address = "127.0.0.1:0" }
tls {
  ca_file   = "`+filepath.Base(caFile)+`"
  cert_file = "`+filepath.Base(cert)+`"
  key_file  = "`+filepath.Base(key)+`"
}
`+ofGateway), 0o600); err != nil {
		t.Fatal(err)
	}
	return sidecar, gateway
}

func TestValidateTellsTheStanding(t *testing.T) {
	for primary, want := range map[string]string{"dc1": "primary of its federation", "dc0": "secondary of dc0"} {
		sidecar, gateway := federated(t, primary)
		code, stdout, stderr := culvert(t, "validate", sidecar, gateway)
		lines := sidecar + ": ok: sidecar dc1/alice, 2 services, 0 peers, 0 gateways, " + want + "\n" +
			gateway + ": ok: gateway dc1/gw1, 0 sidecars, 0 other datacenters, " + want + "\n"
		if code != exitOK || stdout != lines {
			t.Errorf("%s: ends with %d and prints %q %q, want %q", primary, code, stdout, stderr, lines)
		}
	}
}
