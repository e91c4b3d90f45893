//go:build !linux

package sockopt

func packetOptions(int) error { return nil }
func streamOptions(int) error { return nil }
func dialOptions(int) error   { return nil }
