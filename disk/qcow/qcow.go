// Package qcow makes root disks as qcow2 overlays over a raw base file, for QEMU
// on kernels without device-mapper.
//
// An overlay has 4 KiB subclusters where qemu-img can make them, so that what a
// guest writes costs what it writes. Formats are always named, never detected:
// a guest writes the first bytes of its own disk. The overlay belongs to the
// VMM's uid and is therefore not trusted when it comes back: Restore reads its
// header itself and refuses one that points anywhere else than to its base.
package qcow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// overlayName is the overlay's name in Config.Dir.
const overlayName = "overlay.qcow2"

// sector is what disk sizes are multiples of, in bytes.
const sector = 512

// Config says which qemu-img to use.
type Config struct {
	// QemuImg is the tool; the default is qemu-img on PATH.
	QemuImg string
}

// Driver makes overlays.
type Driver struct {
	qemuImg string
	options string // of the format
}

// New finds qemu-img and asks for its version.
func New(config Config) (*Driver, error) {
	name := config.QemuImg
	if name == "" {
		name = "qemu-img"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "find qemu-img: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return nil, sandbox.Errorf(sandbox.KindUnsupported, "ask qemu-img for its version: %w", err)
	}
	return &Driver{qemuImg: path, options: optionsFor(out)}, nil
}

var versionPattern = regexp.MustCompile(`version (\d+)\.(\d+)`)

// optionsFor asks for subclusters where they exist (qemu 5.2). Without them a
// cluster is also what a first write copies, so it is kept small.
func optionsFor(version []byte) string {
	m := versionPattern.FindSubmatch(version)
	if m != nil {
		major, _ := strconv.Atoi(string(m[1])) // digits only
		minor, _ := strconv.Atoi(string(m[2]))
		if major > 5 || major == 5 && minor >= 2 {
			return "cluster_size=128k,extended_l2=on"
		}
	}
	return "cluster_size=4k"
}

// Create makes an overlay. On error nothing of it is left.
func (d *Driver) Create(ctx context.Context, config disk.Config) (_ disk.Disk, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create disk: %w", err)
		}
	}()
	if err := check(config); err != nil {
		return nil, err
	}
	path := filepath.Join(config.Dir, overlayName)
	if _, err := os.Lstat(path); err == nil {
		return nil, sandbox.Errorf(sandbox.KindExists, "%s exists", path)
	}
	if err := admit(config); err != nil {
		return nil, err
	}
	if err := d.publish(ctx, config, path); err != nil {
		return nil, err
	}
	return &overlay{path}, nil
}

// publish makes the overlay under a temporary name and renames it: after a
// crash it is whole or not there.
func (d *Driver) publish(ctx context.Context, config disk.Config, path string) (err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	temp := filepath.Join(config.Dir, ".tmp-"+overlayName)
	u.PushClose("temporary overlay", func() error { return removeFile(temp) })
	if err := d.make(ctx, config, temp); err != nil {
		return err
	}
	if err := os.Chmod(temp, 0o600); err != nil {
		return err
	}
	if err := os.Lchown(temp, config.UID, config.GID); err != nil {
		return err
	}
	if err := osfs.SyncDir(temp); err != nil { // fsync, which is the same call for a file
		return err
	}
	u.PushClose("overlay", func() error { return removeFile(path) }) // a rename may be done and not durable
	return osfs.Rename("disk-overlay", temp, path)
}

// make runs qemu-img.
func (d *Driver) make(ctx context.Context, config disk.Config, path string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, d.qemuImg, "create", "-q", "-f", "qcow2", "-o", d.options,
		"-F", "raw", "-b", config.Base, path, strconv.FormatInt(config.SizeBytes, 10))
	cmd.Stderr, cmd.Stdout = &said, &said
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	kind := sandbox.KindInternal
	if bytes.Contains(said.Bytes(), []byte("No space left on device")) {
		kind = sandbox.KindNoSpace
	}
	return sandbox.Errorf(kind, "qemu-img: %w: %s", err, bytes.TrimSpace(said.Bytes()))
}

// Restore finds the overlay that Create made and checks that it is what the
// config says.
func (d *Driver) Restore(ctx context.Context, config disk.Config) (disk.Disk, error) {
	if err := errors.Join(ctx.Err(), check(config)); err != nil {
		return nil, fmt.Errorf("restore disk: %w", err)
	}
	path := filepath.Join(config.Dir, overlayName)
	got, err := readHeader(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "restore disk: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("restore disk: %s: %w", path, err)
	}
	want := header{backing: config.Base, format: "raw", size: config.SizeBytes}
	if got != want {
		return nil, sandbox.Errorf(sandbox.KindConflict, "restore disk: %s is %v, not %v", path, got, want)
	}
	return &overlay{path}, nil
}

// overlay is one disk. It holds nothing open.
type overlay struct{ path string }

func (o *overlay) Path() string                { return o.path }
func (o *overlay) Format() string              { return "qcow2" }
func (o *overlay) Close(context.Context) error { return nil }

// Remove deletes the overlay, and what an interrupted Create left beside it.
func (o *overlay) Remove(context.Context) error {
	dir := filepath.Dir(o.path)
	return errors.Join(removeFile(filepath.Join(dir, ".tmp-"+overlayName)), removeFile(o.path))
}

// removeFile removes durably; the directory may be gone too.
func removeFile(path string) error {
	if err := osfs.Remove("disk-overlay", path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove disk: %w", err)
	}
	return nil
}
