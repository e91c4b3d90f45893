package config

import (
	"reflect"
	"strings"
)

// live are the fields that a reload changes in a running process.
//
//nolint:gochecknoglobals // a table
var live = map[string]bool{"Gateways": true, "Peers": true, "Datacenters": true, "Sidecars": true}

// Restart names the settings in which two configurations of a sidecar differ
// and that only a restart can change: all but gateways, peers and datacenters,
// and of the federation primary_gateways, retry_join and accept.
func Restart(old, now *Sidecar) []string { return differences(*old, *now) }

// RestartGateway does the same for a gateway: all but sidecars and datacenters,
// and the same of the federation.
func RestartGateway(old, now *Gateway) []string { return differences(*old, *now) }

func differences(old, now any) []string {
	var out []string
	a, b := reflect.ValueOf(old), reflect.ValueOf(now)
	for i := range a.NumField() {
		name := a.Type().Field(i).Name
		if live[name] || reflect.DeepEqual(fixed(a.Field(i).Interface()), fixed(b.Field(i).Interface())) {
			continue
		}
		out = append(out, written(name))
	}
	return out
}

// fixed is a setting without the parts of it that a reload changes.
func fixed(setting any) any {
	f, ok := setting.(*Federation)
	if !ok || f == nil {
		return setting
	}
	rest := *f
	rest.PrimaryGateways, rest.RetryJoin, rest.Accept = nil, nil, nil
	return &rest
}

// written is how the file calls a field.
func written(field string) string {
	switch field {
	case "OnExit":
		return "on_exit"
	case "Services":
		return "service"
	}
	return strings.ToLower(field)
}
