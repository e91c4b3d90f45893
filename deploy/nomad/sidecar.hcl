# Beside a Nomad server that is as it was: all addresses, no advertise block. What
# Culvert calls a datacenter is Nomad's region. The admin address differs from the
# default, as a Consul server's sidecar may be on the host.
datacenter = "dc1"
node       = "alice"
capture    = "redirect"

server {
  profile = "nomad"
  address = "10.71.0.11" # what the server sends to its peers from
}

listen { address = "10.71.0.11:8444" }

tls {
  ca_file   = "/etc/culvert/nomad-ca.pem"
  cert_file = "/etc/culvert/dc1-server-nomad-alice.pem"
  key_file  = "/etc/culvert/dc1-server-nomad-alice-key.pem"
}

gateways = ["10.71.0.1:8443"]

peer "bob" {
  datacenter = "dc2"
  advertise  = "10.72.0.11"
}

admin { address = "127.0.0.1:7441" }
