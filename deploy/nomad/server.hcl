region   = "dc1"
data_dir = "/var/lib/nomad"

server {
  enabled          = true
  bootstrap_expect = 1
  server_join {
    retry_join = ["10.72.0.11:4648"]
  }
}

disable_update_check = true
