datacenter         = "dc1"
node_name          = "alice"
server             = true
bootstrap_expect   = 1
data_dir           = "/var/lib/consul"
encrypt            = "Y3VsdmVydC10ZXN0LWdvc3NpcC1rZXktMDEyMzQ1Njc="
bind_addr          = "10.71.0.11"
advertise_addr_wan = "127.77.1.1"
retry_join_wan     = ["127.77.2.1"]

disable_update_check = true
