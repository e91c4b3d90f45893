datacenter = "dc1"
node       = "alice"

server {
  profile = "serf"
}

listen {
  address = "0.0.0.0:8443"
}

tls {
  ca_file   = "ca.pem"
  cert_file = "alice.pem"
  key_file  = "alice-key.pem"
}

federation {
  primary_datacenter = "dc1"
  primary_gateways   = ["gw.dc1.example"]
  wan_address        = "203.0.113.7"
  bootstrap_expect   = 4
  retry_join         = ["10.71.0.12", "0.0.0.0"]
  data_dir           = ""
  reap               = "3 days"

  accept "dc2" {
    advertise = ["10.72.0.1/16"]
  }

  accept "dc3" {
    advertise = ["10.73.0.0/16"]
    gateways  = ["gw.dc3.example"]
  }

  accept "dc4" {
    advertise = ["10.73.4.0/24"]
  }

  accept "dc5" {}
}
