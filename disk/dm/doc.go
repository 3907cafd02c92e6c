// Package dm makes root disks with the kernel's device-mapper: raw block devices
// that any VMM can open.
//
// What lies on what, from the guest down; every name starts with dm<instance>-,
// and beside the trees everything is found again by asking the kernel:
//
//	o-…  dm-snapshot   one per sandbox; its copy-on-write file, behind a loop device of its own, is in Config.Dir
//	p-…  dm-snapshot   read-only; what the sandbox wrote before a snapshot was taken of it while it ran, for each of these
//	b-…  linear, zero  the base as the guest sees it: extents of layers, and zeros up to the size of the disk
//	l-…  dm-verity     one per layer file; below it one read-only loop device for the file and one for its hash tree
//
// The two lower rows are shared. Nobody counts them: a device is needed while
// the kernel lists holders of it, and is taken away with the last one. Loop
// devices clear themselves when their last user goes (LO_FLAGS_AUTOCLEAR), so a
// process that dies in the middle leaves none.
//
// A bit that flips in a layer is an I/O error for the guest, never wrong bytes;
// Check and Verify say which file and which block. A copy-on-write file is
// sparse and large enough for every block of the disk and their metadata: only
// the host's own free space can run out, which disk.Guard watches. A VMM must
// open the device with O_DIRECT, or what it still has in the page cache when it
// is frozen needs space all the same.
//
// It needs Linux 5.8 (LOOP_CONFIGURE) and the targets linear, zero, snapshot and
// verity. Nodes are made here, in Config.NodeDir; udev is not needed, and is told
// to look into none of the mapped devices, whose content a guest wrote. Loop
// devices cannot tell it so: where udev runs, a rule of the host's has to keep it
// away from those over an overlay.cow.
package dm
