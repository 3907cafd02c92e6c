package qcow

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// check looks at a config and at its base.
func check(config disk.Config) error {
	if !filepath.IsAbs(config.Base) || !filepath.IsAbs(config.Dir) {
		return sandbox.Errorf(sandbox.KindInvalid, "base %q and directory %q must be absolute paths", config.Base, config.Dir)
	}
	info, err := os.Stat(config.Base)
	if errors.Is(err, fs.ErrNotExist) {
		return sandbox.Errorf(sandbox.KindNotFound, "open base: %w", err)
	}
	if err != nil {
		return fmt.Errorf("open base: %w", err)
	}
	if !info.Mode().IsRegular() {
		return sandbox.Errorf(sandbox.KindInvalid, "base %s is not a regular file", config.Base)
	}
	if config.SizeBytes < info.Size() || config.SizeBytes <= 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "disk of %d bytes is smaller than its base, which has %d", config.SizeBytes, info.Size())
	}
	if config.SizeBytes%sector != 0 {
		return sandbox.Errorf(sandbox.KindInvalid, "disk of %d bytes is not a multiple of %d", config.SizeBytes, sector)
	}
	return reachable(config, info)
}

// admit lets the group of the VMM, which has it alone, pass through Dir.
func admit(config disk.Config) error {
	if config.UID == 0 && config.GID == 0 {
		return nil
	}
	if err := os.Chown(config.Dir, -1, config.GID); err != nil {
		return fmt.Errorf("open directory to the VMM: %w", err)
	}
	if err := os.Chmod(config.Dir, 0o710); err != nil {
		return fmt.Errorf("open directory to the VMM: %w", err)
	}
	return nil
}

// reachable says which file or directory the VMM's uid may not open or pass
// through: QEMU would only say "Permission denied".
func reachable(config disk.Config, base fs.FileInfo) error {
	if config.UID == 0 {
		return nil
	}
	if !allows(base, config, 4) {
		return sandbox.Errorf(sandbox.KindInvalid, "base %s with mode %v cannot be read by uid %d", config.Base, base.Mode().Perm(), config.UID)
	}
	for _, path := range []string{config.Base, config.Dir} {
		for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
			info, err := os.Stat(dir)
			if err != nil {
				return err
			}
			if !allows(info, config, 1) {
				return sandbox.Errorf(sandbox.KindInvalid, "uid %d cannot pass through %s with mode %v to %s", config.UID, dir, info.Mode().Perm(), path)
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return nil
}

// allows reports whether the mode gives the VMM's uid the right bits (4 read, 1 pass).
func allows(info fs.FileInfo, config disk.Config, bits fs.FileMode) bool {
	perm := info.Mode().Perm()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		switch {
		case int(st.Uid) == config.UID:
			perm >>= 6
		case int(st.Gid) == config.GID:
			perm >>= 3
		}
	}
	return perm&bits == bits
}
