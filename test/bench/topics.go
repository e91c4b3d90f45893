package main

import "context"

// names are the topics, in the order in which they are measured.
func names() []string {
	return []string{"gateway-bulk", "gateway-short", "gateway-short-tls", "gateway-idle", "sidecar-handshakes", "sidecar-bulk", "sidecar-idle", "storm"}
}

func topics() map[string]func(ctx context.Context, b *bench) (*topic, error) {
	return map[string]func(ctx context.Context, b *bench) (*topic, error){
		"gateway-bulk":       gatewayBulkTopic,
		"gateway-short":      gatewayShortTopic,
		"gateway-short-tls":  gatewayShortTLSTopic,
		"gateway-idle":       gatewayIdleTopic,
		"sidecar-handshakes": sidecarHandshakesTopic,
		"sidecar-bulk":       sidecarBulkTopic,
		"sidecar-idle":       sidecarIdleTopic,
		"storm":              stormTopic,
	}
}
