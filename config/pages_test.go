package config

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

var (
	hclBlock = regexp.MustCompile("(?ms)^```hcl\n(.*?)\n```$")
	topLevel = regexp.MustCompile(`(?m)^([a-z_]+)\b`)
)

// What README.md and the handbook show as a configuration is one: complete, or
// with what it leaves out added, it has no fault.
func TestPagesHaveNoFaults(t *testing.T) {
	for page, atLeast := range map[string]int{"../README.md": 5, "../docs/federation.md": 10} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		found := hclBlock.FindAllStringSubmatch(string(text), -1)
		if len(found) < atLeast {
			t.Errorf("%s has %d configurations, want %d", page, len(found), atLeast)
		}
		for _, m := range found {
			file := write(t, completed(m[1]))
			kind, err := KindOf(file)
			if err == nil && kind == KindSidecar {
				_, err = LoadSidecar(file, options())
			} else if err == nil {
				_, err = LoadGateway(file, options())
			}
			if err != nil {
				t.Errorf("%s shows\n%s\nwhich has faults:\n%v", page, m[1], err)
			}
		}
	}
}

// completed adds what makes a sidecar's configuration of a part of one. One that
// leads to the primary is of a secondary.
func completed(text string) string {
	has := make(map[string]bool)
	for _, m := range topLevel.FindAllStringSubmatch(text, -1) {
		has[m[1]] = true
	}
	if has["datacenter"] {
		return text
	}
	datacenter := "dc1"
	if strings.Contains(text, "primary_gateways") || has["federation"] && has["gateways"] {
		datacenter = "dc2"
	}
	out := "datacenter = \"" + datacenter + "\"\nnode = \"amos\"\nlisten { address = \"10.71.0.14:8443\" }\n" + tlsBlock
	if !has["server"] {
		out += "server {\n  profile = \"serf\"\n  address = \"10.71.0.14\"\n  advertise = \"127.77.1.4\"\n}\n"
	}
	if has["peer"] && !has["gateways"] {
		out += "gateways = [\"10.71.0.1:8443\"]\n"
	}
	return out + text
}
