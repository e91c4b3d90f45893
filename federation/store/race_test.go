//go:build race

package store

// raced says that the race detector is on.
const raced = true
