datacenter = "dc2"
node       = "gw1"

listen {
  address = "[::]"
}

federation {
  primary_datacenter = "dc1"
  primary_gateways   = ["srv:_gw._tcp.dc1.example:8443", "gw.dc1.example:0"]
  bootstrap_expect   = 3
  retry_join         = ["10.72.0.11"]
  reap               = "72h"
  wan_address        = "0.0.0.0"

  accept "dc1" {
    gateways = ["203.0.113.0/24", "203.0.113.0/24"]
  }

  accept "dc1" {
    gateways = []
  }
}
