// Package oci turns container images and root file systems in tar files into a
// folder that holds a root file system.
//
// An image comes from a registry, with credentials given for that call; from an
// OCI layout, a folder; or from an archive, OCI's or Docker's. Whatever arrives
// is compared with its digest, from the manifest down to the unpacked bytes of
// each layer, and of an image for several machines the one for linux/amd64 is
// taken.
//
// Layers are unpacked as a hostile thing. A Tree touches nothing outside its
// folder: every path goes through an os.Root, and the links of the image are
// followed by the package's own rule, in which the folder is "/". Bytes, entries,
// names, layers and the rate of compression are bounded by Limits. Devices and
// pipes are never made on the host; what was left out is reported.
//
// Owners, modes with their setuid bits, times, hard links and the attributes that
// programs need (security.capability, user.*) are kept, which takes root.
package oci
