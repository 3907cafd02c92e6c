package watch

import (
	"os"

	"golang.org/x/sys/unix"
)

// filesystem is what a directory is on, as far as it matters to a watch.
type filesystem int

const (
	local filesystem = iota
	// remote is changed by other machines, of which the kernel tells nothing. FUSE
	// counts as that: what is behind it changes without the kernel's knowledge.
	remote
	// madeUp has no events, and no end of directories.
	madeUp
)

func kindOf(path string) (filesystem, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return local, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.CODA_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.NCP_SUPER_MAGIC:
		return remote, nil
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC,
		unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC:
		return madeUp, nil
	}
	return local, nil
}
