datacenter = "dc1"
node       = "alice"
domian     = "consul"

server {
  profile   = "sarf"
  address   = "0.0.0.0"
  advertise = "127.77.1.1"
}

server {
  adress = "10.71.0.11"
}

service "probe" {
  kind = "packet"
  port = 7999
}

listen "main" {
  address = "10.71.0.11:8443"
}

gateways = ["10.71.0.1:8443"]

peer "bob" {
  datacenter = "dc2"
  advertise  = "127.77.1.1"
}

tls {
  ca_file   = "nowhere/ca.pem"
  cert_file = "nowhere/alice.pem"
  key_file  = "nowhere/alice-key.pem"
}
