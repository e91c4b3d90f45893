//go:build race

package alpn

// raced says that the race detector is on.
const raced = true
