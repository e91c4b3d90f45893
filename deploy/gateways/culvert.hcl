# `culvert gateway` at the edge of dc1. alice's host has a Consul server and a
# Nomad server, each with a sidecar of its own.
datacenter = "dc1"
node       = "gw1"
domains    = ["consul", "nomad"]
listen { address = "0.0.0.0:8443" }

sidecar "alice" { address = "10.71.0.11:8443" }
sidecar "alice" {
  address = "10.71.0.11:8444"
  domain  = "nomad"
}

datacenter "dc2" { gateways = ["10.79.0.2:8443"] }
