# Beside a Consul server that is as it was: all addresses, no advertise_addr_wan.
datacenter = "dc1"
node       = "alice"
capture    = "redirect"

server {
  profile = "consul"
  address = "10.71.0.11" # what the server sends to its peers from
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
