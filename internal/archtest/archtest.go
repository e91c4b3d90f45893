// Package archtest holds what docs/architecture.md says about the shape of the
// code: who may import whom, that goroutines are watched for leaks, and that
// the path a newcomer is told to read exists. It has tests only.
package archtest
