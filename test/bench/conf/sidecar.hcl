datacenter = "dc1"
node       = "alice"
server { hairpin = false }
service "bench" {
  kind  = "stream"
  port  = {{.Port}}
  local = "{{.Local}}"
}
{{- if .Packets}}
service "pings" {
  kind  = "packet"
  port  = {{.Port}}
  local = "{{.Packets}}"
}
peer "bob" {
  datacenter = "dc2"
  advertise  = "{{.Peer}}"
  address    = "{{.Listen}}"
}
{{- end}}
listen { address = "{{.Listen}}" }
tls {
  ca_file   = "ca.pem"
  cert_file = "cert.pem"
  key_file  = "key.pem"
}
admin { address = "{{.Admin}}" }
