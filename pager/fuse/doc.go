// Package fuse serves a flat folder of read-only files to the kernel, and lets
// another process go on with that after the one that served was killed.
//
// It speaks the wire protocol of /dev/fuse (include/uapi/linux/fuse.h) by itself,
// for the one thing that libraries do not provide for: a server that begins in the
// middle. Three things make that possible. Whoever mounts answers the INIT request
// and keeps a duplicate of the descriptor, so that the connection outlives the
// server. A file's node ID is a function of its name alone (Files.Resolve), so that
// what the kernel remembers means the same to every server. And requests are read
// into memory that outlives the server, too (Slots): what it had taken and not
// answered when it died is there for the next one to answer.
//
// It serves what is immutable, and tells the kernel to keep what it has read. Opens
// for writing succeed, for QEMU opens memory files so even to map them privately;
// every change is refused.
package fuse
