# Beside an Alertmanager: any program on hashicorp/memberlist has one gossip port
# and no other.
datacenter = "dc1"
node       = "alice"
capture    = "redirect"

server {
  profile = "memberlist"
  address = "10.71.0.11" # its --cluster.advertise-address
}

service "gossip-packet" { port = 9094 }
service "gossip-stream" { port = 9094 }

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
