datacenter = "dc1"
node       = "gw1"
listen { address = "{{.Listen}}" }
sidecar "opaque" { address = "{{.Opaque}}" }
sidecar "secure" { address = "{{.Secure}}" }
admin { address = "{{.Admin}}" }
