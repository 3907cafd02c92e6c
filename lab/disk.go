package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/dormouse-sandbox/dormouse/lab/wire"
)

// Disk is a file with an ext4 that a lab mounts.
type Disk struct {
	Serial string // its name, at most 20 bytes
	File   string
	Path   string // where it is mounted
	// Writable disks are changed for good. A disk that is not may be used by
	// several labs at once.
	Writable bool
	// Overlay makes one that is not writable look as if it were; what is written
	// goes to scratch.
	Overlay bool
	discard bool // changes are thrown away
}

func (d Disk) options() string {
	switch {
	case d.discard:
		return ",snapshot=on" // a temporary file without a name, in TMPDIR
	case d.Writable:
		return ",cache=unsafe,discard=unmap"
	}
	return ",readonly=on"
}

// disks are all of a lab's disks, its own first.
func (c Config) disks() []Disk {
	return append([]Disk{
		{Serial: "root", File: c.Root, discard: true},
		{Serial: "scratch", File: filepath.Join(c.Dir, scratchName), Path: "/scratch", Writable: true},
		{Serial: "results", File: filepath.Join(c.Dir, resultsName), Path: Results, Writable: true},
	}, c.Disks...)
}

// mounts are what the inside is told; the root it finds by itself.
func (c Config) mounts() []wire.Mount {
	var out []wire.Mount
	for _, d := range c.disks()[1:] {
		out = append(out, wire.Mount{Serial: d.Serial, Path: d.Path, ReadOnly: !d.Writable, Overlay: d.Overlay})
	}
	return out
}

// MakeDisk writes the tree root as an ext4 with room for spareMiB more; an empty
// root makes an empty one. It needs e2fsprogs and no privileges; files belong to
// whom they belong in the tree.
func MakeDisk(ctx context.Context, file, root string, spareMiB int) error {
	blocks, inodes := int64(spareMiB)<<8+4096, int64(4096)
	if root != "" {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			inodes++
			blocks += info.Size()>>12 + 2
			return nil
		})
		if err != nil {
			return fmt.Errorf("measure %s: %w", root, err)
		}
		blocks += blocks / 16
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	args := []string{
		"-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", strconv.FormatInt(inodes+blocks/16, 10),
		"-J", "size=16", "-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard",
	}
	if root != "" {
		args = append(args, "-d", root)
	}
	args = append(args, file, strconv.FormatInt(blocks, 10))
	return runTool(ctx, "mke2fs", args...)
}

// copyOut copies everything on a disk into a folder, after a VM that may have
// died while it wrote to it.
func copyOut(ctx context.Context, file, to string) error {
	// Status 1 says that something was repaired: the journal of a VM that died.
	if err := runTool(ctx, "e2fsck", "-f", "-p", file); exitCode(err) > 1 {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	// debugfs needs no mount and no root. It exits with 0 always.
	if err := runTool(ctx, "debugfs", "-R", "rdump / "+to, file); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(to, "lost+found"))
}

// runTool also looks where distributions keep programs for root.
func runTool(ctx context.Context, name string, args ...string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			return fmt.Errorf("%s is not installed: %w", name, err)
		}
	}
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return 127
}
