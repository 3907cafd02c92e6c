// Package ext4 reads file systems that nobody has to trust: the disk of a
// microVM in which foreign code was root. It is pure Go, mounts nothing, and
// checks every number before it uses it.
//
// It reads what this project makes with mke2fs and what Linux writes into it: 4
// KiB blocks, extents, no inline data and no encryption. The journal must be
// empty, as after an unmount; Dirty says whether it is.
package ext4
