// Package snapshot keeps what a virtual machine's memory or disk held at one
// point: as manifests over immutable layers, on one machine's disk.
//
// A layer is a file of blocks, named by the hash of its content. A manifest says
// of every block of an image where it is: zero, or at a place in a layer. It is
// complete by itself; what it was made from is named by digest in it, and need
// not exist any more. A reference gives manifests a name that people and the host
// agent use, and keeps them.
//
// It promises: whatever has a name is whole and on the disk. A layer or manifest
// is either published or not there. What is read is checked against the digests
// when a chunk is first read, and a flipped bit is a CorruptError with the file
// and the offset in it, never bytes for a guest. What no reference, pin or root
// of the caller's reaches is deleted by Collect, and by nothing else.
//
// It leaves to others what a virtual machine is, how its changed blocks are
// found, and how an image reaches one (pager, host).
package snapshot
