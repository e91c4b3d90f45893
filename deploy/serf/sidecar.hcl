# Beside a serf agent that is as it was: all addresses, no advertise.
datacenter = "dc1"
node       = "alice"
capture    = "redirect"

server {
  profile = "serf"
  address = "10.71.0.11" # what the agent sends to its peers from
}

listen { address = "10.71.0.11:8443" }

tls {
  ca_file   = "/etc/culvert/consul-ca.pem"
  cert_file = "/etc/culvert/dc1-server-consul-alice.pem"
  key_file  = "/etc/culvert/dc1-server-consul-alice-key.pem"
}

gateways = ["10.71.0.1:8443"]

peer "bob" {
  datacenter = "dc2"
  advertise  = "10.72.0.11"
}
