package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// kvmGetAPIVersion is KVM_GET_API_VERSION, _IO(0xAE, 0x00); 12 is the only
// version there ever was since Linux 2.6.22.
const (
	kvmGetAPIVersion = 0xAE00
	kvmAPIVersion    = 12
)

// KVM says whether /dev/kvm opens and answers. That is necessary, not
// sufficient: there are kernels whose KVM creates a VM that never runs an
// ordinary guest, so only a boot of the real guest kernel proves it.
func KVM() error {
	f, err := openNode("/dev/kvm", "load kvm_intel or kvm_amd, or enable virtualization in the firmware or the outer hypervisor")
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // nothing was written
	version, err := unix.IoctlRetInt(int(f.Fd()), kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("ask /dev/kvm for its version: %w", err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("/dev/kvm has API version %d, not %d", version, kvmAPIVersion)
	}
	return nil
}

// FUSE says whether /dev/fuse opens.
func FUSE() error { return probeNode("/dev/fuse", "load the module fuse") }

// TUN says whether /dev/net/tun opens.
func TUN() error { return probeNode("/dev/net/tun", "load the module tun") }

func probeNode(path, cure string) error {
	f, err := openNode(path, cure)
	if err != nil {
		return err
	}
	return f.Close()
}

func openNode(path, cure string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s does not exist: %s", path, cure)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s exists, but this user may not open it", path)
	case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		return nil, fmt.Errorf("%s exists, but no driver is behind it: %s", path, cure)
	}
	return nil, fmt.Errorf("open %s: %w", path, err)
}

// NodeGroup is the group that may read and write a device node, for a process
// that runs as another user; ok is false when the group may not.
func NodeGroup(path string) (gid int, ok bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0, false
	}
	return int(st.Gid), st.Mode&0o060 == 0o060
}

// NodeShut says that a device node is its owner's alone: neither its group nor
// others may read and write it.
func NodeShut(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&0o060 != 0o060 && st.Mode&0o006 != 0o006
}

// CgroupVersion is 2 where /sys/fs/cgroup is the unified hierarchy, 1 where it
// is not (the "hybrid" layout counts as 1: its unified part has no controllers).
func CgroupVersion() (int, error) {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return 0, fmt.Errorf("look at /sys/fs/cgroup: %w", err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return 2, nil
	}
	return 1, nil
}
