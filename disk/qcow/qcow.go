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
	"sync"
	"time"

	"github.com/dormouse-sandbox/dormouse/disk"
	"github.com/dormouse-sandbox/dormouse/internal/fault"
	"github.com/dormouse-sandbox/dormouse/internal/osfs"
	"github.com/dormouse-sandbox/dormouse/internal/sparse"
	"github.com/dormouse-sandbox/dormouse/internal/undo"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

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
	blanks  blanks
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
	config.Dir = filepath.Clean(config.Dir)
	path := overlayPath(config.Dir, 0)
	if _, err := os.Lstat(path); err == nil {
		return nil, sandbox.Errorf(sandbox.KindExists, "%s exists", path)
	}
	if err := removeFiles("disk-overlay-before", config.Dir); err != nil { // of a disk that was half removed
		return nil, err
	}
	if err := admit(config); err != nil {
		return nil, err
	}
	if err := d.publish(ctx, config, 0); err != nil {
		return nil, err
	}
	return &overlay{d: d, config: config}, nil
}

// publish makes the n-th overlay under a temporary name and renames it: after a
// crash it is whole or not there.
func (d *Driver) publish(ctx context.Context, config disk.Config, n int) (err error) {
	path := overlayPath(config.Dir, n)
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run(ctx))
		}
	}()
	temp := filepath.Join(config.Dir, tempName)
	u.PushClose("temporary overlay", func() error { return removeFile("disk-overlay", temp) })
	if err := d.make(ctx, headerOf(config, n), temp); err != nil {
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
	u.PushClose("overlay", func() error { return removeFile("disk-overlay", path) }) // a rename may be done and not durable
	return osfs.Rename("disk-overlay", temp, path)
}

// make makes an empty overlay.
func (d *Driver) make(ctx context.Context, h header, path string) error {
	if err := fault.Point(ctx, "qcow/make"); err != nil {
		return err
	}
	if b := d.blanks.get(h); b != nil {
		return sandbox.NoSpace(b.write(path, h.backing))
	}
	if err := d.run(ctx, h, path); err != nil {
		return err
	}
	if b, err := blankOf(path, h); err == nil { // else qemu-img makes the next one too
		d.blanks.put(h, b)
	}
	return nil
}

// run runs qemu-img. It does not look into what the overlay lies on: a VMM wrote
// that, unless it is the base.
func (d *Driver) run(ctx context.Context, h header, path string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, d.qemuImg, "create", "-q", "-u", "-f", "qcow2", "-o", d.options,
		"-F", h.format, "-b", h.backing, path, strconv.FormatInt(h.size, 10))
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
	config.Dir = filepath.Clean(config.Dir)
	top, err := findLine(config)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.Errorf(sandbox.KindNotFound, "restore disk: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("restore disk: %w", err)
	}
	return &overlay{d: d, config: config, top: top}, nil
}

// Name is "qcow".
func (d *Driver) Name() string { return "qcow" }

// Discard deletes the overlays in dir.
func (d *Driver) Discard(ctx context.Context, dir string) error {
	if !filepath.IsAbs(dir) {
		return sandbox.Errorf(sandbox.KindInvalid, "discard disk: directory %q must be an absolute path", dir)
	}
	return (&overlay{d: d, config: disk.Config{Dir: filepath.Clean(dir)}}).Remove(ctx)
}

// Sweep has nothing to do: a disk is a file in its own directory.
func (d *Driver) Sweep(context.Context, []string) error { return nil }

// Check finds nothing: nobody looks at what QEMU reads of a base.
func (d *Driver) Check(context.Context) (disk.Report, error) { return disk.Report{}, nil }

// overlay is one disk. It holds nothing open.
type overlay struct {
	d      *Driver
	config disk.Config

	mu    sync.Mutex // guards what is below
	top   int        // the last overlay of the line
	spare bool       // there is one more, which no VMM was told of
	known bool       // that the VMM writes to the last one
}

// Path is the last overlay's.
func (o *overlay) Path() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return overlayPath(o.config.Dir, o.top)
}

func (o *overlay) Format() string              { return "qcow2" }
func (o *overlay) Close(context.Context) error { return nil }

// Allocated counts blocks, not bytes: the files are sparse.
func (o *overlay) Allocated() (total int64, _ error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := o.top
	if o.spare {
		last++
	}
	for i := range last + 1 {
		n, err := sparse.AllocatedAt(overlayPath(o.config.Dir, i))
		if err != nil {
			return 0, fmt.Errorf("size of disk: %w", err)
		}
		total += n
	}
	return total, nil
}

// Remove deletes the overlays, and what an interrupted Create left beside them.
func (o *overlay) Remove(context.Context) error { return removeFiles("disk-overlay", o.config.Dir) }

const tempName = ".tmp-" + overlayName

// removeFiles deletes the first overlay first: with it goes the disk, and Create
// takes away what is left of the others. The directory may be gone too.
func removeFiles(op, dir string) error {
	numbers, err := later(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove disk: %w", err)
	}
	errs := []error{removeFile(op, filepath.Join(dir, tempName)), removeFile(op, overlayPath(dir, 0))}
	if errs[1] != nil {
		return errors.Join(errs...)
	}
	for _, n := range numbers {
		errs = append(errs, removeFile(op, overlayPath(dir, n)))
	}
	return errors.Join(errs...)
}

// removeFile removes durably, as the step op; the directory may be gone too.
func removeFile(op, path string) error {
	if err := osfs.Remove(op, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove disk: %w", err)
	}
	return nil
}
