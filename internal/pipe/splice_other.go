//go:build !linux

package pipe

import "net"

func moveFromTCP(dst net.Conn, src *net.TCPConn, count counter) (int64, error) {
	return copyBuffer(dst, src, count)
}

// awaitReset is not told apart from a clean end where there is no splice.
func awaitReset(*net.TCPConn) bool { return false }
