// Package lab runs a real Linux host under QEMU's software emulation, on any
// Linux machine: with root, KVM (QEMU emulates AMD's SVM too), device-mapper,
// loop devices, cgroup v2, nftables and TUN. What this machine lacks, a test
// finds there.
//
// Boot starts one and returns when it says that it is complete; a boot that hangs
// is killed and made again, a few times, and that is said. Run runs a command in
// it, as root. Files go in as disks made beforehand (see MakeDisk). What a command
// writes to /results comes back when the lab is closed, with core files, the
// kernel's log and the console, also after the lab had to be killed.
//
// A lab has no network but its own loopback interface, and nothing it does
// outlives it: the root disk's changes are thrown away. It is for tests, and no
// security boundary.
//
// Building its root file system and finding out what to run in it is left to the
// caller (test/lab); package wire is what is spoken with its init, lab/init.
package lab
