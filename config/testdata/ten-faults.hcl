datacenter = "DC1"
nodde      = "alice"

server {
  profile   = "consul"
  advertise = "0.0.0.0"
  hairpin   = "yes"
}

service "rpc" {
  port = 83000
}

listen "here" {
  address = "10.71.0.11:https"
}

tls {
  ca_file   = "ca.pem"
  cert_file = "alice.pem"
}

gateways = ["10.71.0.1"]

peer "bob" {
  datacenter = "dc2"
  advertise  = "127.77.2.1"
}

peer "carol" {
  datacenter = "dc2"
  advertise  = "127.77.2.1"
}
