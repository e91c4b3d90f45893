package config

import (
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// Attributes returns every attribute of the schema, as "sidecar:
// server.address", sorted. Labels do not count.
func Attributes() []string {
	var out []string
	for kind, schema := range map[Kind]string{
		KindSidecar: `datacenter node domain capture on_exit gateways
			server.profile server.address server.advertise server.hairpin server.tls
			service.kind service.port service.local service.alpn
			listen.address listen.passthrough listen.passthrough_tls tls.ca_file tls.cert_file tls.key_file
			peer.datacenter peer.advertise peer.address datacenter.gateways datacenter.mode
			federation.primary_datacenter federation.primary_gateways federation.bootstrap_expect federation.retry_join
			federation.data_dir federation.address federation.reap federation.accept.advertise federation.accept.gateways
			admin.address log.level log.format`,
		KindGateway: `datacenter node domain domains listen.address sidecar.address sidecar.domain
			datacenter.gateways tls.ca_file tls.cert_file tls.key_file
			federation.primary_datacenter federation.primary_gateways federation.retry_join federation.data_dir
			federation.address federation.wan_address federation.accept.advertise federation.accept.gateways
			admin.address log.level log.format`,
	} {
		for path := range strings.FieldsSeq(schema) {
			out = append(out, string(kind)+": "+path)
		}
	}
	slices.Sort(out)
	return out
}

// Used returns the attributes that a file sets, named as by [Attributes],
// sorted. The error is [Faults], for a file that cannot be read or parsed.
func Used(file string) ([]string, error) {
	kind, err := KindOf(file)
	if err != nil {
		return nil, err
	}
	_, root, err := open(file, Options{})
	if err != nil {
		return nil, err
	}
	var out []string
	var collect func(prefix string, body *hclsyntax.Body)
	collect = func(prefix string, body *hclsyntax.Body) {
		for key := range body.Attributes {
			out = append(out, string(kind)+": "+prefix+key)
		}
		for _, b := range body.Blocks {
			collect(prefix+b.Type+".", b.Body)
		}
	}
	collect("", root.body)
	slices.Sort(out)
	return slices.Compact(out), nil
}
