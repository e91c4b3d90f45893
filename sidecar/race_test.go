//go:build race

package sidecar

// raced says that the race detector is on.
const raced = true
