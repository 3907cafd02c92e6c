package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// nsfsMagic is the file system type of a mounted namespace (linux/magic.h).
const nsfsMagic = 0x6e736673

// createNamespace makes a namespace and mounts it at path, where it lives
// until removeNamespace, whatever becomes of this process.
func createNamespace(ctx context.Context, path string) error {
	if err := do(ctx, "namespace-dir", "make "+nsDir, func() error { return makeDir(nsDir) }); err != nil {
		return err
	}
	err := do(ctx, "namespace-file", "make namespace file", func() error {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY|unix.O_CLOEXEC, 0o444)
		if err != nil {
			return err
		}
		return f.Close()
	})
	if err != nil {
		return err
	}
	unshare := func() error {
		return do(ctx, "namespace-unshare", "make namespace", func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	}
	return away(unshare, func() error {
		return do(ctx, "namespace-mount", "mount namespace at "+path, func() error {
			return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		})
	})
}

// makeDir makes a folder for namespaces, and a mount of its own of it, shared, as
// iproute2 wants it: the first `ip netns add` would otherwise mount the folder over
// itself, and what we had mounted there lay below, where nobody can unmount it.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if isMount(dir) {
		return nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // releases the lock
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	if isMount(dir) { // somebody was faster
		return nil
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s over itself: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share the mount of %s: %w", dir, err)
	}
	return nil
}

// isMount says whether a file system is mounted at path, a part of the same one too.
func isMount(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// isNamespace says whether a namespace is mounted at path.
func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == nsfsMagic
}

// removeNamespace unmounts and unlinks; what is missing is success.
func removeNamespace(ctx context.Context, path string) error {
	return errors.Join(
		do(ctx, "namespace-unmount", "unmount namespace "+path, func() error { return unmountAll(path) }),
		do(ctx, "namespace-unlink", "remove "+path, func() error {
			if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		}),
	)
}

// unmountAll also takes off mounts that lie on each other.
func unmountAll(path string) error {
	for range 16 {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // not a mount point (any more)
		case err != nil:
			return err
		}
	}
	return fmt.Errorf("%s has more than 16 mounts on it", path)
}

// leftovers lists the slots of an instance that have a namespace file.
func leftovers(ctx context.Context, inst instance) ([]int, error) {
	if err := step(ctx, "namespace-list"); err != nil {
		return nil, fmt.Errorf("list %s: %w", nsDir, err)
	}
	entries, err := os.ReadDir(nsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var found []int
	for _, e := range entries {
		if index, ok := inst.index(e.Name()); ok {
			found = append(found, index)
		}
	}
	return found, nil
}
