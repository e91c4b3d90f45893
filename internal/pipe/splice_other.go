//go:build !linux

package pipe

import "net"

func moveFromTCP(dst net.Conn, src *net.TCPConn, count counter) (n int64, read, write error) {
	return copyBuffer(dst, src, count)
}

// Resets are not told apart from clean ends where there is no splice, and
// nothing is known of what is under way.

func awaitReset(*net.TCPConn) bool { return false }
func isClosed(*net.TCPConn) bool   { return false }
func isFlushed(*net.TCPConn) bool  { return true }
