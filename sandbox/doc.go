// Package sandbox holds the words of the system: what a sandbox is called, what
// shape it has, which states it passes through, and the kinds of things that go
// wrong with it.
//
// It promises that a value which passed its checks is safe to use as a file
// name, a host name or a number of CPUs anywhere else. It does no I/O and uses
// the standard library only, so that every other package may import it.
package sandbox
