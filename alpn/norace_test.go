//go:build !race

package alpn

const raced = false
