package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	newRoot = "/newroot"

	// rootWait bounds the wait for the disk: its driver finds it while it is
	// loaded, so what is not there soon will never be.
	rootWait = 10 * time.Second
)

// mountRoot mounts the disk and grows its file system to the disk's size.
// noatime, because reading a file must not change a block.
func (s *System) mountRoot() error {
	device := s.Boot.RootDevice
	if err := s.missing(awaitDevice(device, rootWait)); err != nil {
		return err
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, newRoot, "ext4", unix.MS_NOATIME, ""); err != nil {
		return s.missing(fmt.Errorf("mount %s: %w", device, err))
	}
	if err := grow(device, newRoot); err != nil {
		return fmt.Errorf("grow the file system of %s: %w", device, err)
	}
	return nil
}

func awaitDevice(path string, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for pause := 500 * time.Microsecond; ; pause = min(2*pause, 50*time.Millisecond) {
		_, err := os.Stat(path)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no device %s after %v", path, limit)
		}
		time.Sleep(pause)
	}
}

// grow makes a mounted ext4 as large as its device. One that is as large
// already costs one read.
func grow(device, mounted string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	var super [1024]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		return fmt.Errorf("read the superblock: %w", err)
	}
	have, blockSize, err := parseSuper(super[:])
	if err != nil {
		return err
	}
	size, err := ioctlUint64(f, unix.BLKGETSIZE64)
	if err != nil {
		return fmt.Errorf("size of the device: %w", err)
	}
	want := size / blockSize
	if want <= have {
		return nil
	}
	dir, err := os.Open(mounted)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // read only
	return resize(dir, want)
}

// ext4ResizeFS is EXT4_IOC_RESIZE_FS: _IOW('f', 16, __u64).
const ext4ResizeFS = 0x40086610

func resize(dir *os.File, blocks uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return fmt.Errorf("to %d blocks: %w", blocks, errno)
	}
	return nil
}

func ioctlUint64(f *os.File, request uintptr) (uint64, error) {
	var value uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&value)))
	if errno != 0 {
		return 0, errno
	}
	return value, nil
}

// parseSuper reads the size of an ext4 out of its superblock, in blocks.
// https://www.kernel.org/doc/html/latest/filesystems/ext4/globals.html
func parseSuper(super []byte) (blocks, blockSize uint64, err error) {
	le := binary.LittleEndian
	if magic := le.Uint16(super[0x38:]); magic != 0xEF53 {
		return 0, 0, fmt.Errorf("not an ext4: magic %#x", magic)
	}
	shift := le.Uint32(super[0x18:])
	if shift > 6 { // 64 KiB is the largest block
		return 0, 0, fmt.Errorf("ext4 with a block size of 2^%d KiB", shift)
	}
	blocks = uint64(le.Uint32(super[0x4:]))
	const incompat64Bit = 0x80
	if le.Uint32(super[0x60:])&incompat64Bit != 0 {
		blocks |= uint64(le.Uint32(super[0x150:])) << 32
	}
	return blocks, 1024 << shift, nil
}

// switchRoot makes the disk the root, and frees the memory of the initramfs by
// deleting what is in it. The running binary stays, without a name.
func switchRoot() error {
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		target := filepath.Join(newRoot, dir)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := emptyInitramfs(); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root: %w", err)
	}
	return errors.Join(unix.Chroot("."), os.Chdir("/"))
}

// emptyInitramfs deletes everything but the new root. It refuses to touch
// anything that is not the memory file system the kernel unpacked.
func emptyInitramfs() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return err
	}
	if st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("the root is of type %#x, not an initramfs", st.Type)
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if "/"+e.Name() == newRoot {
			continue
		}
		if err := os.RemoveAll("/" + e.Name()); err != nil {
			return fmt.Errorf("free the initramfs: %w", err)
		}
	}
	return nil
}
