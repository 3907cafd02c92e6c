// Package template makes what a sandbox is started from: base images, the guest
// kernel and the initramfs.
//
// A base image is a sparse ext4 file built from Debian packages, with mmdebstrap
// and "mke2fs -d": nothing is mounted on the host. A build is cached under the
// hash of its recipe. What is published is whole or not there at all, is never
// changed afterwards, and is named by its content: a template that is built anew
// gets a new image beside the old one, which running sandboxes may still use.
//
// Builds need root, because an image holds files of other owners. Everything a
// build makes lies in a work folder that its builder holds a lock on; Open and
// the next Build remove the folders whose builder is gone. Removing published
// images that nothing uses is left to the caller.
package template
