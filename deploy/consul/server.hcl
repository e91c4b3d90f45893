datacenter       = "dc1"
node_name        = "alice"
server           = true
bootstrap_expect = 1
data_dir         = "/var/lib/consul"
encrypt          = "Y3VsdmVydC10ZXN0LWdvc3NpcC1rZXktMDEyMzQ1Njc="
retry_join_wan   = ["10.72.0.11"]

disable_update_check = true
