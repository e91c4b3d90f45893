# Beside a serf agent that advertises a virtual address: no privilege is needed.
datacenter = "dc1"
node       = "alice"

server {
  profile   = "serf"
  address   = "10.71.0.11" # what the agent binds
  advertise = "127.77.1.1" # what the agent advertises
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
  advertise  = "127.77.2.1"
}
