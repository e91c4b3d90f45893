//go:build !linux

package sockopt

import "time"

func packetOptions(int, time.Duration) error { return nil }
func streamOptions(int) error                { return nil }
func streamSetup(int) error                  { return nil }
func deferAccept(int, time.Duration) error   { return nil }
func packetSetup(int) error                  { return nil }
func capRTO(int) (bool, error)               { return false, nil }
